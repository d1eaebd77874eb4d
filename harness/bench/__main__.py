"""``python -m harness.bench``."""

import typer

from harness.bench import drawn, endurance, harness, loading, plans, scaling, triton
from harness.command import run_command

app = typer.Typer(
    help="Measurements of the harness, as ratios in one run. Figures go to a JSON file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("harness")(harness.bench)
app.command("loading")(loading.bench)
app.command("triton")(triton.bench)
app.command("plans")(plans.bench)
app.command("scaling")(scaling.bench)
app.command("endurance")(endurance.bench)
app.command("drawn")(drawn.bench)

if __name__ == "__main__":
    run_command(app, "python -m harness.bench")
