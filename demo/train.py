"""Trains the demo checkpoint on scenes composed on the fly: ``python -m demo.train``."""

import dataclasses
import json
import math
import pickle
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from demo.evaluate import DATA, MEAN, STD, evaluate
from demo.glyphs import ATLAS, DemoError
from demo.recipes import RECIPES, Recipe
from demo.scene_pool import ScenePool, SceneSource, augment
from export.architecture import Architecture, Network
from export.architectures import by_name
from export.config import Config
from export.errors import ExportError
from export.ssd_resnet34 import SSD_RESNET34

WARM_UP = 0.03
"""Share of the time budget over which the learning rate rises to its peak."""
EMA_DECAY = 0.999
WEIGHT_DECAY = 0.02
GRADIENT_NORM = 10.0
LOG_EVERY = 50
"""Steps between two lines of the log."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run: the command's arguments, see `train`."""

    model: str
    width: int
    image_size: int
    minutes: float
    batch: int
    lr: float
    workers: int
    pool: int
    seed: int


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine down to zero; ``progress`` runs from 0 to 1."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    turn = min((progress - WARM_UP) / (1 - WARM_UP), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * turn))


class Average:
    """Exponential moving average of a model's parameters and batch-norm statistics."""

    def __init__(self, model: Network) -> None:
        # Both dictionaries refer to live tensors, which training changes in place.
        self._present = model.state_dict()
        self.state = {name: value.clone() for name, value in self._present.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's present state; faster in the first steps."""
        self.steps += 1
        weight = 1 - min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[name] for name in floats], [self._present[name] for name in floats], weight
        )
        for name in self.state.keys() - set(floats):
            self.state[name].copy_(self._present[name])


class Trainer:
    """Model, optimiser and average, and one step of training them."""

    def __init__(self, recipe: Recipe, config: Config, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        # Channels last is for CUDA: on CPUs, PyTorch 2.13 crashes in it below 16 channels.
        cuda = device.type == "cuda"
        self.layout = torch.channels_last if cuda else torch.contiguous_format
        self.model = recipe.architecture.network(config).to(device)
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.average = Average(self.model)
        self.postprocess = self.model.postprocess()
        self.priors = torch.cat([self.postprocess.centre, self.postprocess.size]).T.to(device)
        self.mean = torch.tensor(MEAN, device=device)[:, None, None] * 255
        self.std = torch.tensor(STD, device=device)[:, None, None] * 255
        decayed: list[Tensor] = [p for p in self.model.parameters() if p.ndim > 1]
        others: list[Tensor] = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups,
            weight_decay=WEIGHT_DECAY,
            fused=cuda,
        )

    def step(self, images: Tensor, boxes: Tensor, classes: Tensor, lr: float) -> Tensor:
        """Update the weights once.

        Parameters
        ----------
        images
            float32 [N, 3, S, S], RGB in 0..255.
        boxes, classes
            See `demo.objective.overlaps`.
        lr
            Learning rate of this step.

        Returns
        -------
        float32 [2], loc and conf loss, on the device.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.model.train()
        pixels = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        # On a CPU bfloat16 would only be slower.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loc, conf = self.model(pixels)
        loc_loss, conf_loss = self.recipe.loss(
            self.postprocess.join(loc, 4).float(),
            self.postprocess.join(conf, self.model.config.num_classes).float(),
            self.recipe.match(boxes, classes, self.priors),
        )
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loc_loss + conf_loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimiser.step()
        self.average.update()
        return torch.stack([loc_loss, conf_loss]).detach()

    def averaged(self) -> Network:
        """Return a new model that holds the average."""
        model = self.recipe.architecture.network(self.model.config).to(self.device)
        model.load_state_dict(self.average.state)
        return model.eval()

    def save(self, path: Path, images_seen: int) -> None:
        """Write what `restore` needs, float32."""
        state = {
            "config": self.model.config.to_json(),
            "model": self.model.state_dict(),
            "average": self.average.state,
            "average_steps": self.average.steps,
            "optimiser": self.optimiser.state_dict(),
            "images_seen": images_seen,
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Take over what `save` wrote to ``path``."""
        if state["config"] != self.model.config.to_json():
            raise DemoError(f"{path}: is of {state['config']}, not {self.model.config.to_json()}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.state = {k: v.to(self.device) for k, v in state["average"].items()}
        self.average.steps = state["average_steps"]


def _read_resume(path: Path) -> dict[str, Any]:
    """Read a .resume.pt file onto the CPU."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DemoError(f"{path}: cannot resume from it ({error})") from error
    return state


def save_weights(model: Network, architecture: Architecture, path: Path) -> None:
    """Write a .safetensors file: FP16 weights, and the configuration as metadata."""
    from safetensors.torch import save_file

    tensors = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={architecture.config_key: model.config.to_json()})
    partial.chmod(0o644)
    partial.replace(path)


def run(
    plan: Plan, atlas: Path, resume: Path | None, log: Path | None
) -> tuple[Trainer, dict[str, Any]]:
    """Train for the plan's time; returns the trainer and a summary of the run."""
    recipe = RECIPES[plan.model]
    config = recipe.config(plan.image_size, plan.width)
    state = _read_resume(resume) if resume else {}
    seen_before = int(state.get("images_seen", 0))
    # A resumed run must see new scenes, so the key of its random streams depends on the past.
    source = SceneSource(atlas, plan.image_size, (plan.seed, seen_before))
    pool = ScenePool(source, plan.workers, plan.pool)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(plan.seed + seen_before)
    trainer = Trainer(recipe, config, device)
    if resume:
        trainer.restore(resume, state)
    pool.start(device, minimum=4 * plan.batch)

    lines = log.open("a") if log else None
    start = time.monotonic()
    steps, progress, lr = 0, 0.0, 0.0
    total = torch.zeros(2, device=device)
    record: dict[str, Any] = {}
    while progress < 1:
        progress = (time.monotonic() - start) / (60 * plan.minutes)
        lr = learning_rate(progress, plan.lr)
        total += trainer.step(*augment(*pool.draw(plan.batch)), lr)
        steps += 1
        if steps % LOG_EVERY == 0 or progress >= 1:
            elapsed = time.monotonic() - start
            loc, conf = (total / (steps % LOG_EVERY or LOG_EVERY)).tolist()
            total.zero_()
            record = {
                "step": steps,
                "seconds": round(elapsed, 1),
                "loc_loss": round(loc, 4),
                "conf_loss": round(conf, 4),
                "lr": lr,
                "images_per_second": round(steps * plan.batch / elapsed, 1),
                "scenes_per_second": round(pool.made / elapsed, 1),
            }
            if lines:
                print(json.dumps(record), file=lines, flush=True)
            if steps % (10 * LOG_EVERY) == 0:
                print(json.dumps(record), flush=True)
    pool.stop()
    if lines:
        lines.close()
    seen = steps * plan.batch
    summary = {
        **dataclasses.asdict(plan),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "steps": steps,
        "images_seen": seen_before + seen,
        "scenes_made": pool.made,
        "final": record,
    }
    return trainer, summary


app = typer.Typer(add_completion=False)


@app.command()
def train(  # noqa: PLR0917 - each is a named option of the command line
    out: Annotated[Path, typer.Option("-o", "--out", help="the .safetensors to write")],
    atlas: Annotated[Path, typer.Option(help="pictures, from python -m demo.glyphs")] = ATLAS,
    model: Annotated[str, typer.Option(help="detector, as export-onnx names it")] = (
        SSD_RESNET34.name
    ),
    width: Annotated[int, typer.Option(help="channels of the first convolution")] = 16,
    image_size: Annotated[int, typer.Option(help="side of the network's input")] = 400,
    minutes: Annotated[float, typer.Option(help="training time; the schedule fits it")] = 8.0,
    batch: Annotated[int, typer.Option(help="images per step")] = 128,
    lr: Annotated[
        float | None, typer.Option(help="peak learning rate", show_default="the detector's")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes that compose scenes")] = 15,
    pool: Annotated[int, typer.Option(help="scenes kept on the device")] = 16384,
    seed: Annotated[int, typer.Option(help="selects the random streams")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="the .resume.pt of a run to go on from, on new scenes")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="JSON lines to append to")] = None,
    data: Annotated[Path, typer.Option(help="validation data, evaluated at the end")] = DATA,
) -> None:
    """Train, then write OUT, OUT's .resume.pt (float32) and .json (summary with mAP)."""
    recipe = RECIPES[by_name(model).name]
    peak = recipe.lr if lr is None else lr
    plan = Plan(model, width, image_size, minutes, batch, peak, workers, pool, seed)
    trainer, summary = run(plan, atlas, resume, log)
    averaged = trainer.averaged()
    save_weights(averaged, recipe.architecture, out)
    trainer.save(out.with_suffix(".resume.pt"), summary["images_seen"])
    try:
        summary["metrics"] = evaluate(averaged, data, trainer.device)
    except ImportError as error:
        print(f"not evaluated here ({error}); run python -m demo.evaluate {out}")
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def main() -> None:
    """Run the command; a user error becomes one line and exit code 2."""
    try:
        app()
    except (DemoError, ExportError) as error:
        print(f"train: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
