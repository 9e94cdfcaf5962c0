"""This module declares the options of the command `python -m fused_sam demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import DemoError
from .options import FASHION_FOLDER, Settings, read_settings
from .presets import PRESETS


def _default(name: str) -> str:
    """Return an option's default for each data set."""
    values = {data: getattr(preset, name) for data, preset in PRESETS.items()}
    texts = {data: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for data, v in values.items()}
    return "; ".join(f"{data} {text}" for data, text in texts.items())


def demo(
    data: Annotated[str, typer.Option(metavar="NAME", help="The images: digits or fashion-mnist.")] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with Fashion-MNIST's four IDX .gz files.", show_default=str(FASHION_FOLDER)
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="all, sgd, sgd-2x or sam; may be repeated.", show_default="all"),
    ] = None,
    rho: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,...",
            help="SAM's rho: one value, or several to choose from on the validation split.",
            show_default=_default("rhos"),
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(metavar="X,...", help="Learning rates: every one is trained.", show_default=_default("lrs")),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Runs of each optimizer, with seeds 0 to N - 1.", show_default=_default("seeds")
        ),
    ] = None,
    epochs: Annotated[
        str | None,
        typer.Option(metavar="N", help="Epochs; sgd-2x takes twice as many.", show_default=_default("epochs")),
    ] = None,
    noise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRACTION,...",
            help="Fraction of training and validation labels to replace at random; several are tried in turn.",
            show_default="0.4",
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Images per step.", show_default=_default("batch_size")),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="Backend of fused_sam.SAM; `python -m fused_sam info` lists them."),
    ] = "auto",
    processes: Annotated[
        str | None,
        typer.Option(metavar="N", help="Runs at the same time, each on one thread.", show_default="one per core"),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The figure: .png, .pdf or .svg.")] = Path(
        "fused_sam_demo.png"
    ),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all numbers to this file too.")] = None,
) -> None:
    """Train a small network on images with wrong labels: SGD, SGD for twice the epochs, and fused SAM.

    Every learning rate is trained to the last epoch. rho, and the learning rate and the epoch of early stopping, are
    chosen on a validation split with labels as wrong as the training labels. The accuracies shown are those on clean
    test labels.
    """
    try:
        settings = read_settings(
            data=data,
            data_dir=data_dir,
            optimizer=optimizer or ["all"],
            rho=rho or [],
            lr=lr or [],
            seeds=seeds,
            epochs=epochs,
            noise=noise or ["0.4"],
            batch_size=batch_size,
            backend=backend,
            processes=processes,
            output=output,
            json=json,
        )
        _run(settings)
    except DemoError as error:
        typer.echo(f"fused_sam demo: {error}", err=True)
        raise typer.Exit(2) from None


def _run(settings: Settings) -> None:
    # Imported here, so that --help and errors in options are fast.
    from .run import run

    run(settings)
