"""NMS_OPT_TRT as a Python IPluginV3 without a kernel: enough for parsing and building."""
# ruff: noqa: ARG002 (TensorRT gives the arguments)

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def registered_nms(trt):
    """Register the plugin for a while; yields a list that gets what TensorRT tells it.

    An entry is a dictionary: the fields of a creation, by name, or ``batches``, the smallest, best
    and largest batch of a configuration. The parser hands the node's attributes over as fields and
    asks for shapes and formats, which is what a build without a GPU exercises; `enqueue` is never
    called.
    """
    told = []

    class Plugin(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        def __init__(self, keep_top_k):
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = "NMS_OPT_TRT", "1", ""
            self.num_outputs = 2
            self.keep_top_k = keep_top_k

        def get_capability_interface(self, kind):
            return self

        def get_output_data_types(self, input_types):
            return [trt.DataType.FLOAT, trt.DataType.INT32]

        def get_output_shapes(self, inputs, shape_inputs, builder):
            batch = inputs[0][0]
            rows, columns = builder.constant(self.keep_top_k), builder.constant(7)
            return [trt.DimsExprs([batch, rows, columns]), trt.DimsExprs([batch])]

        def supports_format_combination(self, position, tensors, num_inputs):
            desc = tensors[position].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if position == num_inputs + 1:
                return desc.type == trt.DataType.INT32
            if position >= num_inputs - 1:  # priors, detections
                return desc.type == trt.DataType.FLOAT
            return desc.type in (trt.DataType.FLOAT, trt.DataType.HALF)

        def configure_plugin(self, inputs, outputs):
            told.append({"batches": (inputs[0].min[0], inputs[0].opt[0], inputs[0].max[0])})

        def get_workspace_size(self, inputs, outputs):
            return 0

        def get_fields_to_serialize(self):
            return trt.PluginFieldCollection([])

        def clone(self):
            return Plugin(self.keep_top_k)

        def attach_to_context(self, context):
            return self

        def on_shape_change(self, inputs, outputs):
            return 0

        def enqueue(self, *_):
            raise NotImplementedError

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self):
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "NMS_OPT_TRT", "1", ""
            integer, real = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
            names = {
                **dict.fromkeys(
                    (
                        *("numClasses", "topK", "keepTopK", "backgroundLabelId", "numLayers"),
                        *("inputOrder", "shareLocation", "varianceEncodedInTarget", "confSigmoid"),
                        *("confSoftmax", "isNormalized", "codeType"),
                    ),
                    integer,
                ),
                **dict.fromkeys(("confidenceThreshold", "nmsThreshold"), real),
            }
            empty = b""
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, empty, kind) for name, kind in names.items()]
            )

        def create_plugin(self, name, fields, phase):
            values = {field.name: field.data for field in fields}
            told.append(values)
            return Plugin(int(values["keepTopK"][0]))

    registry, creator = trt.get_plugin_registry(), Creator()
    registry.register_creator(creator, "")
    yield told
    registry.deregister_creator(creator)
