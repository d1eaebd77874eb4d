"""From a FP32 detector to its INT8 form: placement, calibration, Q/DQ."""
