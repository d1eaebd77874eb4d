"""Graph surgery: everything behind the head convolutions becomes one NMS_OPT_TRT node."""
