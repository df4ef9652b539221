"""`ssmzoo probe NAME <checkpoint>`: look inside a trained model; writes PNG, CSV and a Markdown summary."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    from ssmzoo.probes.names import probes

    known = probes()
    parser = subparsers.add_parser(
        "probe",
        help="look inside a trained model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Probes:\n" + "\n".join(f"  {name:22s}{text}" for name, text in known.items()),
    )
    add = parser.add_argument
    add(
        "name",
        choices=known,
        metavar="NAME",
        type=lambda name: SHORT.get(name, name),
        help=", ".join(known) + "; erf is short for receptive_field, lam for local_attribution",
    )
    add(
        "checkpoint",
        help="a run folder, a checkpoint folder inside one, or the name of a model for images or their restoration "
        "(timm's: timm/NAME): its initial weights, or with --pretrained the released ones, on embedded photographs",
    )
    add(
        "--pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="TAG",
        help="a model given by name: with its released weights, fetched if need be (TAG where it has several)",
    )
    add("--input", help="a text to read (or @file), or a picture; default: validation data of the run")
    add("--out", type=Path, help="folder for the results; default: probes/NAME beside the checkpoint")
    add("--layers", type=numbers, metavar="0,2", help="scans to show, numbered by depth")
    add("--channels", type=numbers, metavar="0,1", help="channels to show")
    add(
        "--positions",
        type=numbers,
        metavar="0,64",
        help="tokens whose reading to show (hidden_attention): long inputs then need memory for these rows alone",
    )
    add(
        "--masks",
        metavar="FILE|otsu",
        help="true segmentation of the images (.npy or picture; above 0 foreground, "
        "255 unlabelled), or otsu: what is brighter than Otsu's threshold; maps are then scored against it",
    )
    add("--target", type=int, help="token id or class to explain; default: the model's first choice")
    add("--length", type=at_least(2), default=128, help="tokens to read of a text (128)")
    add("--batch", type=at_least(1), default=4, help="samples of the validation data (4)")
    add(
        "--max-bytes",
        type=at_least(1, float),
        default=2**30,
        help="memory that a tap, and the matrices made of it, may each take (2^30)",
    )
    return parser


SHORT = {"erf": "receptive_field", "lam": "local_attribution"}


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,2") from None


def at_least(lowest: int, kind: type = int):
    """A type for arguments: numbers from `lowest` on."""

    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number of {lowest} or more")
        return value

    return number


def run(args: argparse.Namespace) -> int:
    from ssmzoo.checkpoint_files import find_checkpoint

    command = command_of(args)
    module = importlib.import_module(f"ssmzoo.probes.{args.name}")
    whose = args.checkpoint
    if Path(args.checkpoint).exists():
        if args.pretrained:
            raise ValueError(f"--pretrained is for a model given by name; {args.checkpoint} has weights of its own")
        folder = find_checkpoint(args.checkpoint)
        out = args.out or folder.parent.parent / "probes" / args.name
        if args.name == "expressivity":
            return expressivity(module, folder, out, command)
        subject = load_subject(folder, args)
    else:
        from ssmzoo.cli.probe_by_name import named_subject

        subject, out = named_subject(args.checkpoint, args), args.out or Path("probes") / args.name / args.checkpoint
        whose += " with released weights" if args.pretrained else " with initial weights, not trained"
    finding = module.probe(subject)
    files = finding.write(out, f"{args.name}: {type(subject.model).__name__} of {whose}", command)
    print(f"model: {whose}")
    for key, value in finding.summary.items():
        print(f"{key}: {value}")
    print(f"written to {out}: {', '.join(f.name for f in files)}")
    return 0


def command_of(args: argparse.Namespace) -> str:
    """The command line that gives these arguments; what has its default is left out."""
    parser = argparse.ArgumentParser()
    defaults = vars(add_parser(parser.add_subparsers()).parse_args([args.name, str(args.checkpoint)]))
    words = ["ssmzoo", "probe", args.name, str(args.checkpoint)]
    for key in (
        "input",
        "layers",
        "channels",
        "positions",
        "masks",
        "target",
        "length",
        "batch",
        "max_bytes",
        "pretrained",
    ):
        value = getattr(args, key)
        if value is True:
            words.append(f"--{key}")
        elif value != defaults[key]:
            words += [
                f"--{key.replace('_', '-')}",
                ",".join(map(str, value))
                if isinstance(value, list)
                else f"{value:g}"
                if isinstance(value, float)
                else str(value),
            ]
    return shlex.join(words)


def expressivity(module, folder: Path, out: Path, command: str) -> int:
    from ssmzoo.zoo import load_model

    model, manifest = load_model(folder)
    found = module.run(model, dict(manifest["config"]["data"]), out)
    figures = "\n".join(f"![{f.stem}]({f.name})" for f in found.figures)
    (out / "summary.md").write_text(f"# expressivity\n\n`{command}`\n\n{found.text}\n\n{figures}\n", encoding="utf-8")
    print(f"{found.text}\nwritten to {out}")
    return 0


def load_subject(folder: Path, args: argparse.Namespace):
    """The model with an input that it takes: text, an image, or validation data of the run."""
    from ssmzoo.probes.subject import Subject
    from ssmzoo.zoo import load_model

    model, manifest = load_model(folder)
    chosen = dict(
        layers=args.layers,
        channels=args.channels,
        positions=args.positions,
        target=args.target,
        max_bytes=int(args.max_bytes),
    )
    if "tokenizer" in manifest:
        if args.masks is not None:
            raise ValueError("--masks are for images; this checkpoint is a language model's")
        return Subject(model, **read_text(manifest, args), **chosen)
    subject = Subject(model, **read_samples(model, manifest, args), **chosen)
    if args.masks is not None:
        subject.masks = read_masks(subject, args)
    return subject


def read_text(manifest: dict, args) -> dict:
    import torch

    from ssmzoo.data.text_tokenizer import from_dict

    tokenizer = from_dict(manifest["tokenizer"])
    stream = data_text(manifest)
    if args.input is None:
        ids = stream[: args.batch * args.length].unflatten(0, (-1, args.length))
    else:
        text = Path(args.input[1:]).read_text(encoding="utf-8") if args.input.startswith("@") else args.input
        ids = torch.as_tensor(tokenizer.encode(text), dtype=torch.long)[None]
        if ids.shape[1] < 2:
            raise ValueError(f"--input {args.input!r} has {ids.shape[1]} tokens; give at least 2")
        if ids.shape[1] > args.length:
            raise ValueError(
                f"--input has {ids.shape[1]} tokens, more than --length {args.length} allows; raise it "
                f"(the memory of hidden attention grows with its square, up to --max-bytes) or shorten "
                f"the text"
            )
    return dict(
        inputs=ids,
        labels=[tokenizer.decode([i]) for i in ids[0].tolist()],
        text=stream,
        train_text=data_text(manifest, training=True) if args.name == "generalization_bound" else None,
        classes=[tokenizer.decode([i]) for i in range(tokenizer.vocab_size)],
        vocab_size=tokenizer.vocab_size,
    )


def data_module(manifest: dict, stage: str = "validate"):
    from ssmzoo.train import config

    plain = dict(manifest["config"]["data"])
    if "tokenizer" in manifest and "tokenizer" in plain:
        plain |= {"tokenizer": manifest["tokenizer"], "bpe_vocab_size": None}
    data = config.build_node(plain, "ssmzoo.data.")
    data.prepare_data()
    data.setup(stage)
    return data


def data_text(manifest: dict, training: bool = False, tokens: int = 20_000):
    """(n) ids of the run's validation or training data."""
    import torch

    data = data_module(manifest, "fit" if training else "validate")
    found, total = [], 0
    for batch in data.train_dataloader() if training else data.val_dataloader():
        ids = batch["input_ids"].flatten()
        found.append(ids)
        total += len(ids)
        if total >= tokens:
            break
    return torch.cat(found)[:tokens].long()


def read_samples(model, manifest: dict, args) -> dict:
    """Images or strings of the validation data, or the picture given."""
    import torch

    if args.input is not None:
        return {"inputs": read_image(model, manifest, Path(args.input))}
    data = data_module(manifest)
    batch = next(iter(data.val_dataloader()))
    key = next((k for k in ("input_ids", "image", "lq") if k in batch), None)
    if key is None:
        raise ValueError(f"the run's data gives {', '.join(batch)}, none of which a probe can read; pass --input")
    inputs = batch[key][: args.batch]
    if not inputs.is_floating_point():
        inputs = inputs.long()[:, : args.length]
        labels = [str(i) for i in inputs[0].tolist()]
        sizes = getattr(data, "sizes", {})
        words = sizes.get("vocab_size") if "num_states" not in sizes else None  # automata answer with classes
        return dict(inputs=inputs, labels=labels, vocab_size=words)
    answers = batch.get("label")
    return dict(
        inputs=inputs,
        classes=getattr(data, "classes", None),
        answers=None if answers is None else torch.as_tensor(answers)[: args.batch],
    )


def read_masks(subject, args):
    """(b y x) as `Subject.masks` wants them, in the size of the model's images."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    if not subject.is_image:
        raise ValueError("--masks are for images; this checkpoint's model reads symbols")
    if args.masks == "otsu":
        from skimage.filters import threshold_otsu

        grey = subject.inputs.mean(1)  # (b y x)
        return torch.stack([(g > float(threshold_otsu(g.numpy()))).long() for g in grey])
    file = Path(args.masks)
    if not file.exists():
        raise ValueError(f"--masks {file}: no such file (nor 'otsu')")
    if file.suffix == ".npy":
        mask = np.load(file, allow_pickle=False)
    else:
        from ssmzoo.data.image_file import read_picture

        mask = np.asarray(read_picture(file).levels)
    mask = torch.as_tensor(mask.astype(np.int64))
    mask = mask.amax(-1) if mask.ndim == 3 and mask.shape[-1] <= 4 else mask
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) != len(subject.inputs):
        raise ValueError(
            f"--masks {file} has shape {tuple(mask.shape)}; expected (y, x) for one picture, or "
            f"({len(subject.inputs)}, y, x) for the {len(subject.inputs)} images read"
        )
    mask = F.interpolate(mask[:, None].float(), subject.inputs.shape[-2:], mode="nearest")[:, 0].long()
    return torch.where(mask == 255, -1, (mask > 0).long())


def read_image(model, manifest: dict, file: Path):
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ssmzoo.data.image_file import read_picture

    if not file.exists():
        raise ValueError(f"--input {file}: no such picture (texts are for language models only)")
    picture = read_picture(file)
    levels = np.ascontiguousarray(picture.levels.astype(np.float32))
    image = torch.from_numpy(levels).permute(2, 0, 1)[None] / picture.top
    data = data_module(manifest)
    channels, side = data.sizes.get("in_chans", 3), data.sizes.get("img_size", image.shape[-1])
    image = image.mean(1, keepdim=True).expand(-1, channels, -1, -1) if image.shape[1] != channels else image
    image = F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    if hasattr(data, "normalisation"):
        mean, std = (torch.as_tensor(v).float().view(1, -1, 1, 1) for v in data.normalisation())
        image = (image - mean) / std
    return image
