"""``lit-tricks card``: a checkpoint's model card, in the form of Hugging Face's, from the folder of its run.

One caveat: the card lacks the intended use and the license of the model. Add them yourself.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import lit_tricks
from lit_tricks import callbacks
from lit_tricks._compat import CLASS_PATH_KEY
from lit_tricks.commands.checkpoints import checkpoint_at, read_checkpoint, require_finite
from lit_tricks.run.reading.run import FILES, Run, read_run_folder
from lit_tricks.run.report.citations import citations, link_of
from lit_tricks.run.report.content import Table, results_table, tricks_table
from lit_tricks.run.report.escaping import code_block, code_span, escape_markdown
from lit_tricks.run.report.fit import metrics_at
from lit_tricks.run.report.page import markdown_table
from lit_tricks.run.report.style import duration
from lit_tricks.utils.files import printable, write_whole
from lit_tricks.utils.log import log

__all__ = ["Facts", "card", "text_of"]


NAMES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "ece": "expected calibration error"}
TYPES = {"top1": "accuracy", "top5": "accuracy", "ece": "expected_calibration_error"}
TASKS = {"Segmenter": "image-segmentation", "Detector": "object-detection"}  # the Hub's names; of others classification


def card(
    checkpoint: str,
    *,
    output: str | None = None,
    license: str = "unknown",  # noqa: A002  # the name of the field
    overwrite: bool = False,
) -> Path:
    """Write the model card of a checkpoint: recipe, metrics, tricks, and BibTeX of the methods used.

    The card is a README.md for the Hugging Face Hub, with the Hub's metadata. Values that the checkpoint lacks come
    from its run folder.

    Args:
        checkpoint: a checkpoint, or a run folder, runs/NAME/vN, with its best checkpoint.
        output: file to write; by default README.md in the run folder, or next to the checkpoint.
        license: identifier of the model's license, such as apache-2.0.
        overwrite: replace ``output`` if it exists.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: if the checkpoint, or the folder of ``output``, does not exist.
        FileExistsError: if ``output`` exists, without ``overwrite``.
        ValueError: if the file is no checkpoint.
    """
    path = checkpoint_at(checkpoint)
    facts = Facts.of(path)
    target = Path(output) if output else facts.run.path / "README.md"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: choose another file with --output, or give --overwrite to replace it.")
    if not target.resolve().parent.is_dir():
        raise FileNotFoundError(f"--output {target} lies in a folder that does not exist: make it first.")
    write_whole(target, text_of(facts, license))
    log.info("card: %s", target)
    return target


def text_of(facts: Facts, license_id: str, timm_folder: str = "", mode: str = "RGB", exif: bool = False) -> str:
    """Return the card of a checkpoint, or of an exported timm folder.

    Args:
        facts: of the checkpoint.
        license_id: identifier of the license.
        timm_folder: name of the folder; empty for the checkpoint itself.
        mode: of the images, as PIL calls it.
        exif: whether images are rotated by their EXIF orientation.
    """
    use = _use_of_folder(timm_folder, mode, exif) if timm_folder else _use_of_checkpoint(facts)
    library = "timm" if timm_folder else "lit-tricks"
    return f"---\n{_front_matter(facts, license_id, library)}---\n\n{_text(facts, use)}"


class Facts:
    """The facts of a checkpoint, from the checkpoint and its run."""

    @classmethod
    def of(cls, path: Path) -> Facts:
        """Read a checkpoint, and the folder of its run, where it lies in one.

        Raises:
            ValueError: if the file is no checkpoint.
        """
        content = read_checkpoint(path)
        require_finite(path, content["state_dict"])
        folders = [f for f in (path.parent, path.parent.parent) if any((f / name).is_file() for name in FILES)]
        return cls(path, content, read_run_folder(folders[0]) if folders else Run(path.stem, path.parent))

    def __init__(self, path: Path, content: dict[str, Any], run: Run) -> None:
        run = replace(run, config=_without_places(run.config), tricks=_without_places(run.tricks))
        self.path = path
        self.content = content
        self.run = run
        hparams = _without_places(content.get("hyper_parameters", {}))
        data = _without_places(content.get("datamodule_hyper_parameters", {}))
        model = run.config.get("model", {}).get("init_args", {}) | hparams
        self.settings: dict[str, Any] = model
        made = model.get("model", hparams.get(CLASS_PATH_KEY, ""))
        self.is_module: bool = isinstance(made, dict)  # a network of the user, by its class path
        self.model: str = str(made.get("class_path", "") if self.is_module else made).rpartition(".")[2] or "model"
        self.model_args: dict[str, Any] = (made.get("init_args") if self.is_module else model.get("model_args")) or {}
        self.module: str = str(hparams.get(CLASS_PATH_KEY) or run.config.get("model", {}).get("class_path", ""))
        self.classes: list[str] = model.get("class_names") or []
        settings = run.config.get("data") or {}
        self.data: str = str(data.get(CLASS_PATH_KEY) or settings.get("class_path", "")).rpartition(".")[2]
        self.data_settings: dict[str, Any] = settings.get("init_args", {}) | {
            k: v for k, v in data.items() if not k.startswith("_")
        }
        optimizer = model.get("optimizer") or {}
        self.optimizer: str = str(optimizer.get("class_path", "")) or ", ".join(content.get("optimizers", []))
        self.optimizer_settings: dict[str, Any] = optimizer.get("init_args", {})
        self.is_best: bool = Path(run.results.get("best_checkpoint") or "-").name == path.name
        self.tricks: dict[str, dict[str, Any]] = run.tricks or {
            name: {"arguments": {}, "effect": ""}
            for key in content.get("callbacks", {})
            if (name := key.partition("{")[0]) in callbacks.__all__
        }
        self.metrics: dict[str, dict[str, float]] = run.metrics if self.is_best else {}
        if not self.is_best and "loops" in content:  # without, a command made it of what the run had saved
            found = {split: metrics_at(run.rows, split, content["epoch"]) for split in ("train", "val")}
            self.metrics = {split: metrics for split, metrics in found.items() if metrics}

    @property
    def name(self) -> str:
        """Return the facts of the model."""
        return f"{self.model}-{self.dataset}" if self.dataset else self.model

    @property
    def dataset(self) -> str:
        """A short name of the data: the name of the folder or the table, where the images are in one."""
        place = {"ImageFolder": "root", "ImageTable": "table"}.get(self.data, "")
        root = str(self.data_settings.get(place, ""))
        return re.sub(r"[^\w.-]+", "-", Path(root).name.removesuffix(".csv") if root else self.data).lower()

    def citations(self) -> list[str]:
        """BibTeX entries of the methods used."""
        names = [re.sub(r" \(\d+\)$", "", name) for name in self.tricks]
        links = [link_of(getattr(callbacks, name).__doc__) for name in names if name in callbacks.__all__]
        ours = self.module.rpartition(".")[2] in ("Classifier", "")
        methods = {self.data, self.optimizer.rpartition(".")[2]} | ({"timm"} if ours else set())
        methods |= {
            known for known in ("resnet", "small_vgg", "inception_v3", "mobilenetv1") if self.model.startswith(known)
        }
        if self.model == "resnet" and (self.settings.get("model_args") or {}).get("variant", "D") != "B":
            links.append("https://arxiv.org/abs/1812.01187")  # its variants are that paper's
        methods |= {"DIST" for trick in self.tricks.values() if trick.get("arguments", {}).get("loss") == "dist"}
        methods |= {"average"} if "averaged_from" in self.content else set()
        return citations(links, methods)


def _front_matter(facts: Facts, license_id: str, library: str) -> str:
    task = TASKS.get(facts.module.rpartition(".")[2], "image-classification")
    tags = [task, *(["timm"] if library == "timm" else []), "lit-tricks", "pytorch-lightning"]
    tags += [re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower() for name in facts.tricks]
    results = [
        {
            "task": {"type": task, "name": task.replace("-", " ").title()},
            "dataset": {"name": facts.data or facts.dataset, "type": facts.dataset, "split": split},
            "metrics": [
                {"type": TYPES[name], "name": NAMES[name], "value": round(found[name], 4)}
                for name in NAMES
                if math.isfinite(found.get(name, math.nan))
            ],
        }
        for split, found in facts.metrics.items()
        if split != "train" and facts.dataset and not NAMES.keys().isdisjoint(found)
    ]
    matter: dict[str, Any] = {"license": license_id, "library_name": library, "tags": tags}
    matter |= {"pipeline_tag": task}
    matter |= {"datasets": [facts.dataset]} if facts.dataset else {}
    if results:
        matter |= {"metrics": ["accuracy"], "model-index": [{"name": facts.name, "results": results}]}
    return yaml.safe_dump(matter, sort_keys=False)


def _text(facts: Facts, use: list[str]) -> str:
    run, content = facts.run, facts.content
    classes = f" for {len(facts.classes)} classes" if facts.classes else ""
    data = f" trained on {escape_markdown(facts.data)}" if facts.data else ""
    title, model = escape_markdown(facts.name), code_span(facts.model)
    lines = [f"# {title}", "", f"{model}{classes},{data} with lit_tricks {lit_tricks.__version__}.", ""]
    if length := content.get("ema_length"):
        lines += [f"Its weights are a power-law average of the run, of length {length:g}.", ""]
    elif averaged := content.get("averaged_from"):
        lines += [f"Its weights are the average of {len(averaged)} checkpoints.", ""]
    lines += ["## Results", ""]
    shown = Run(run.name, run.path, results={run.kind or "raw": facts.metrics})
    table = results_table([shown])
    what = f"{run.kind} weights" if run.kind else "weights"
    epoch = f"At epoch {content['epoch']}, {what}. " if "epoch" in content else ""
    if table.rows:
        test = "" if "test" in facts.metrics else " This checkpoint was not tested."
        ece = "; ece is the expected calibration error" * any("ece" in split for split in facts.metrics.values())
        lines += [f"{epoch}Accuracies in per cent{ece}.{test}", ""]
        lines += [*markdown_table(table), ""]
    else:
        lines += ["None are known: the folder of the run has no metrics of this checkpoint.", ""]
    lines += ["## Use", "", *code_block("\n".join(use), "python"), ""] if use else []
    lines += ["## Recipe", "", *markdown_table(_recipe(facts)), ""]
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False)
        lines += ["<details><summary>All settings, for <code>lit-tricks fit --config FILE</code></summary>", ""]
        lines += [*code_block(text.rstrip(), "yaml"), "", "</details>", ""]
    lines += ["## Tricks", ""]
    if facts.tricks:
        tricks = tricks_table(Run(run.name, run.path, tricks=facts.tricks))
        lines += [*markdown_table(tricks), ""]
        lines += [] if run.tricks else ["Those that left a trace in the checkpoint; the run keeps no list of them.", ""]
    else:
        lines += ["None.", ""]
    lines += ["## Citation", "", "```bibtex", "\n\n".join(facts.citations()), "```", ""]
    return "\n".join(lines)


def _use_of_checkpoint(facts: Facts) -> list[str]:
    if facts.module.rpartition(".")[2] not in ("Classifier", ""):
        return []
    name = json.dumps(printable(facts.path.name))
    return [
        "import lit_tricks",
        "",
        f'[(names, probabilities)] = lit_tricks.predict({name}, "image.jpg")  # the five best',
        "",
        f'model = lit_tricks.Classifier.load_from_checkpoint({name}, map_location="cpu").eval()',
        "transform = model.transform()  # from a PIL image or a file to the input, as in validation",
        'logits = model(transform("image.jpg")[None])',
    ]


def _use_of_folder(folder: str, mode: str, exif: bool) -> list[str]:
    opened = 'ImageOps.exif_transpose(Image.open("image.png"))' if exif else 'Image.open("image.png")'
    return [
        "import timm",
        f"from PIL import Image{', ImageOps' if exif else ''}",
        "",
        f"model = timm.create_model({json.dumps(f'local-dir:{printable(folder)}')}, pretrained=True).eval()",
        '# on the Hub: "hf-hub:USER/NAME"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        f'image = {opened}.convert("{mode}")',
        "probabilities = model(transform(image)[None]).softmax(dim=1)[0]",
        'print(model.pretrained_cfg["label_names"][int(probabilities.argmax())])',
    ]


def _recipe(facts: Facts) -> Table:
    trainer = facts.run.config.get("trainer", {})
    found = {
        "model": _call(facts.model, facts.model_args) if facts.is_module else f"{facts.model} {facts.model_args or ''}",
        "start": facts.settings.get("weights") or "random weights",
        "optimizer": _call(facts.optimizer, facts.optimizer_settings) if facts.optimizer else None,
        "data": _call(facts.data, facts.data_settings) if facts.data else None,
        "epochs": trainer.get("max_epochs"),
        "batches accumulated": trainer.get("accumulate_grad_batches"),
        "gradient clipping": trainer.get("gradient_clip_val"),
        "precision": trainer.get("precision"),
        "devices": trainer.get("devices"),
        "seed": facts.run.config.get("seed_everything"),
        "training time": duration(facts.run.results["seconds"]) if facts.run.results.get("seconds") else None,
    }
    return Table("Recipe", ["setting", "value"], [[k, str(v).strip()] for k, v in found.items() if v is not None])


def _without_places(value: Any) -> Any:
    """Return settings without the folders of this machine: of an absolute path only its last part."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and re.match(r"/|~|\\\\|[A-Za-z]:[\\/]|file:", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"
