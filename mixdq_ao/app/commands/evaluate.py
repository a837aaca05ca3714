"""mixdq evaluate"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..inputs import at_least, load_pipeline, part, plan_of
from ..output import counted, show_json, show_table, wrote

if TYPE_CHECKING:
    from ...evaluate import Results, Run
    from ...evaluate.choose import Sources
    from ...plan import Plan

HELP = "draw pictures for the prompts of a benchmark and judge them: FID, CLIPScore, ImageReward, LPIPS, SSIM, PSNR"
EXAMPLE = (
    "mixdq evaluate run examples/shapes/pipeline --plan plan.json --prompts prompts.txt --reference out/fp32 "
    "--metrics ssim,psnr --out out/w8a8"
)
REAL = "mixdq evaluate real coco/val2014 --inception inception.safetensors --out real.safetensors"
TABLE = "mixdq evaluate table out/fp32 out/w8a8 out/w4a8 --markdown out/table.md"
PROMPTS = "mixdq evaluate prompts captions_val2014.json --last 1024 --out prompts.txt"
METRICS = "fid,clip,imagereward,lpips,ssim,psnr"
SOURCES = "COCO's captions_*.json, MJHQ-30K's meta_data.json, one prompt a line, or org/dataset[:file] on the hub"
PACKAGES = ("pillow", "torch-fidelity", "torchmetrics", "torchvision")


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="run|real|table|prompts", parser_class=type(parser)
    )
    for name, text, example, add in (
        ("run", "draw and judge; a stopped run continues, shards meet in one directory", EXAMPLE, _run_arguments),
        ("real", "features of real pictures, for FID", REAL, _real_arguments),
        ("table", "runs side by side, with intervals of the differences", TABLE, _table_arguments),
        ("prompts", "write prompts one a line, for calibrate and analyze", PROMPTS, _prompts_arguments),
    ):
        add(options.command(kinds, name, text, example))


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    options.pipeline(parser)
    options.plan(parser, required=False)
    options.calibration(parser, "ranges for a plan without them")
    _prompts(parser, required=True)
    parser.add_argument("--metrics", default="ssim,psnr", metavar="LIST", help=f"some of {METRICS}; or none")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="the run of full precision, for lpips, ssim and psnr"
    )
    parser.add_argument("--real", type=Path, metavar="FILE", help="from mixdq evaluate real, for fid")
    _features(parser)
    parser.add_argument("--clip", metavar="NAME", help="directory or hub name (default openai/clip-vit-large-patch14)")
    parser.add_argument("--imagereward", type=Path, metavar="FILE", help="its weights, safetensors")
    parser.add_argument(
        "--bert", metavar="NAME", help="ImageReward's tokenizer (default google-bert/bert-base-uncased)"
    )
    parser.add_argument("--lpips", choices=("alex", "vgg", "squeeze"), default="alex", help="default alex")
    parser.add_argument(
        "--shard", type=part, default="1/1", metavar="K/N", help="only part K of N; others may run elsewhere"
    )
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first; pays with many pictures")
    options.sampling(parser, "1", 16, frames=False)
    options.out(parser, "evaluation", "directory of the run; give the same to continue")
    options.as_json(parser)


def _real_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="with real pictures, in folders or not")
    _prompts(parser, required=False)
    _features(parser)
    parser.add_argument("--crop", type=at_least(8), metavar="N", help="resize and cut to N x N first (default: as is)")
    parser.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="pictures at once (default 32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    options.out(parser, "real.safetensors", "file to write")


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="of finished runs; differences are from the first"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table here")
    options.as_json(parser)


def _prompts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help=SOURCES)
    parser.add_argument("--last", type=at_least(1), metavar="N", help="only the last N (default: all)")
    options.out(parser, "prompts.txt", "file to write")


def _prompts(parser: argparse.ArgumentParser, *, required: bool) -> None:
    why = "" if required else "; only the pictures that these name (default: all)"
    parser.add_argument("--prompts", required=required, metavar="FILE", help=SOURCES + why)
    parser.add_argument("--count", type=at_least(1), metavar="N", help="the first N of them (default: all)")


def _features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of FID's Inception v3, safetensors")
    parser.add_argument("--resize", choices=("tensorflow", "clean"), default="tensorflow", help="default tensorflow")
    parser.add_argument("--features", metavar="MODULE:FUNCTION", help="other features than Inception's, for fid")


def run(args: argparse.Namespace) -> None:
    {"run": _run, "real": _real, "table": _table, "prompts": _write_prompts}[args.kind](args)


def _run(args: argparse.Namespace) -> None:
    from ...evaluate import Run, Settings, Shard, content_of, read_prompts
    from ...evaluate.choose import choose
    from ...evaluate.settings import digest

    shard, prompts = Shard.parse(args.shard), read_prompts(args.prompts)
    drawn = prompts.first(args.count)
    plan = plan_of(args)
    device = _device(args.device)
    names = ("steps", "guidance_scale", "seed", "height", "width")
    chosen: dict[str, Any] = {name: getattr(args, name) for name in names}
    chosen["dtype"] = args.dtype or ("float32" if device.startswith("cpu") else "float16")
    chosen |= {"plan": None if plan is None else digest(plan.to_json())}
    content = content_of(args.pipeline)
    # The path of the directory may differ between machines, and its contents identify it.
    chosen["pipeline"] = Path(args.pipeline).resolve().name if content else args.pipeline
    chosen["content"] = " ".join(filter(None, (content, args.variant)))
    chosen |= {"prompts": drawn.digest, "count": len(drawn.texts)}
    metrics = choose([n for n in args.metrics.split(",") if n not in ("", "none")], _sources(args, device))
    settings = Settings(**chosen)
    job = Run(args.out, settings, prompts, metrics, lambda: _load(args, device, plan), args.reference)
    done = job.work(shard, args.batch_size)
    figures = job.figures()
    if figures is None:
        wrote(args.out, f"{job.done()} of {counted(settings.count, 'picture')}; run without --shard when all are there")
        return
    wrote(args.out, f"{counted(settings.count, 'picture')}, {done} of them drawn or judged now")
    _finish(args, job, figures, device)


def _finish(args: argparse.Namespace, job: Run, figures: Any, device: str) -> None:
    from ...evaluate import Results

    results = Results.of(figures, job.metrics, job.settings, **_circumstances(args, device))
    results.save(args.out)
    _show({args.out.resolve().name: Results.load(args.out)}, args)


def _circumstances(args: argparse.Namespace, device: str) -> dict[str, Any]:
    from ..environment import environment
    from ..machine import versions_of

    found = environment()
    found["packages"] |= versions_of(PACKAGES)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("run", "traceback")}
    return {"options": given, "device": device, "environment": found}


def _load(args: argparse.Namespace, device: str, plan: Plan | None) -> Any:
    where = options.where(args) | {"device": device}
    pipe = load_pipeline(args.pipeline, **where, steps=[args.steps])
    from ..quantized import make_ready

    make_ready(pipe, plan, compiled=args.compile)
    return pipe


def _sources(args: argparse.Namespace, device: str) -> Sources:
    from ...evaluate.choose import Sources

    names = ("inception", "resize", "features", "real", "clip", "imagereward", "bert", "lpips")
    given = {name: getattr(args, name, None) for name in names}
    return Sources(device=device, **{name: value for name, value in given.items() if value is not None})


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _real(args: argparse.Namespace) -> None:
    from ...errors import MixDQError
    from ...evaluate import measure_real, read_prompts, real_files
    from ...evaluate.choose import features_of

    names = None
    if args.prompts is not None:
        names = read_prompts(args.prompts).first(args.count).files
        if names is None:
            raise MixDQError(f"{args.prompts}: names no pictures; leave --prompts out to take all in {args.directory}")
    files = real_files(args.directory, names)[: args.count]
    features, identity = features_of(_sources(args, _device(args.device)))
    sizes: dict[str, Any] = {"crop": args.crop, "batch_size": args.batch_size}
    found = measure_real(files, features, args.out, identity=identity, **sizes)
    wrote(args.out, f"{counted(len(found.mean), 'feature')} of {counted(len(files), 'picture')}")


def _write_prompts(args: argparse.Namespace) -> None:
    from ...evaluate import read_prompts

    texts = read_prompts(args.source).texts[-(args.last or 0) :]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
    wrote(args.out, counted(len(texts), "prompt"))


def _table(args: argparse.Namespace) -> None:
    from ...evaluate import Results

    same = len({path.name for path in args.runs}) < len(args.runs)
    _show({str(path) if same else path.name: Results.load(path) for path in args.runs}, args)


def _show(runs: dict[str, Results], args: argparse.Namespace) -> None:
    from ...evaluate import markdown, rows_of

    header, rows = rows_of(runs)
    if getattr(args, "markdown", None) is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(header, rows), encoding="utf-8")
        wrote(args.markdown, f"{counted(len(rows), 'run')}")
    if args.json:
        show_json({name: _figures(result) for name, result in runs.items()})
        return
    show_table("95 % intervals by bootstrap over pictures", header, rows)


def _figures(result: Results) -> dict[str, Any]:
    return {
        name: {
            "value": figure.value,
            "interval": None if figure.interval is None else list(figure.interval),
            "pictures": figure.count,
        }
        for name, figure in result.figures.items()
    }
