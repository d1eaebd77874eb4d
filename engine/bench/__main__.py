"""``python -m engine.bench``."""

import typer

from engine.bench import (
    accuracy,
    calibration,
    calibrators,
    cudnn,
    cudnn_plot,
    int8,
    onnxruntime,
    plans,
    plans_plot,
)
from engine.support.command import run_command

app = typer.Typer(
    help="Measurements of engines, as ratios in one run. Figures go to a JSON file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("int8")(int8.bench)
app.command("accuracy")(accuracy.bench)
app.command("calibration")(calibration.bench)
app.command("calibrators")(calibrators.bench)
app.command("onnxruntime")(onnxruntime.bench)
app.command("cudnn")(cudnn.bench)
app.command("tensorrt")(plans.bench)
app.command("tensorrt-plot")(plans_plot.plot)
app.command("cudnn-plot")(cudnn_plot.plot)

if __name__ == "__main__":
    run_command(app, "python -m engine.bench")
