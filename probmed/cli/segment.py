"""`probmed segment`: tissue posteriors and volumes of scans."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from probmed.atlases import LabelAtlas, default_atlas, read_atlas
from probmed.cli import progress
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    DrawsOption,
    QuietOption,
    SeedOption,
    check_device,
    command_line,
    make_folder,
    remove_if_empty,
)
from probmed.models import ZOO
from probmed.report import network_page, segmentation_page
from probmed.volumes import UnusableInput, bids_stem, read_scan
from probmed.workflows import segmentation
from probmed.workflows.outputs import check_outputs, output_names, with_sidecars, write_segmentation
from probmed.workflows.provenance import Provenance
from probmed.workflows.segmentation import SegmentationResult
from probmed.workflows.stages import pick_device
from probmed.workflows.supervision_outputs import Labelled, network_names, write_network_segmentation


@dataclass(frozen=True)
class Subject:
    """The channels of one subject, the first of which gives names and grid."""

    channels: tuple[Path, ...]

    @classmethod
    def parse(cls, text: str) -> Subject:
        """``T1.nii.gz,T2.nii.gz``, unless there is a file of just this name."""
        if "," not in text or Path(text).exists():
            return cls((Path(text),))
        return cls(tuple(Path(part) for part in text.split(",") if part))

    @property
    def name(self) -> str:
        return str(self.channels[0])

    @property
    def stem(self) -> str:
        return bids_stem(self.channels[0])


@dataclass(frozen=True)
class Request:
    """What is asked of every subject."""

    atlas: LabelAtlas
    out: Path
    draws: int
    samples: int
    device: str
    seed: int
    quiet: bool
    protect: tuple[Path, ...]
    networks: tuple[Any, ...] = ()


def segment(
    scans: Annotated[
        list[str],
        typer.Argument(
            metavar="SCAN",
            help="Scans, one a subject: NIfTI or MGH, heads or stripped brains. Channels of one subject are "
            "joined by commas, without spaces: T1.nii.gz,T2.nii.gz. The first gives the grid and the names "
            "of the outputs.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model of `probmed models` (segmentation), or folders of networks or shapes, whose mean is taken.", show_default=False),
    ] = None,
    atlas: Annotated[
        Path | None,
        typer.Option(
            help="Folder with probability maps and atlas.json; the MNI152 head if not given.",
            show_default=False,
        ),
    ] = None,
    draws: DrawsOption = 50,
    samples: Annotated[
        int, typer.Option(min=0, max=999, help="Label maps to draw from the posterior and write.")
    ] = 0,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Segment brain scans into tissues, with posteriors, volumes and their intervals.

    Of sub-01_T1w.nii.gz it writes, all or nothing: sub-01_T1w_dseg.nii.gz (labels), _label-GM_probseg and so
    on (posteriors), _desc-entropy, _desc-bias, _desc-corrected, warps to the atlas and back (for ITK, ANTs),
    _volumes.tsv with 50, 80 and 95 % intervals, a JSON file beside each, and _report.html. Networks and shapes
    (--model) give the same but for field, corrected scan and warps.

    [bold]Examples[/bold]

        probmed segment sub-01_T1w.nii.gz -o out

        probmed segment sub-*_T1w.nii.gz -o out --quiet

        probmed segment sub-01_T1w.nii.gz,sub-01_T2w.nii.gz,sub-01_FLAIR.nii.gz -o out

    A list goes on after a scan that fails and ends with a table of failures and exit status 1. Where nothing
    could be used, the status is 2.
    """
    subjects = [Subject.parse(text) for text in scans]
    protect = tuple(path for subject in subjects for path in subject.channels)
    made: list[Path] = []
    try:
        check_device(device)
        networks = _networks(model or [], pick_device(device.value))
        maps = default_atlas() if atlas is None else read_atlas(atlas)
        made = make_folder(out)
        if atlas is not None:
            protect += tuple(atlas.iterdir())
    except UnusableInput as error:
        progress.say(str(error))
        raise typer.Exit(2) from error
    request = Request(maps, out, draws, samples, device.value, seed, quiet, protect, networks)
    try:
        failures, unforeseen = _each(subjects, request, debug)
    finally:
        remove_if_empty(made)
    if failures and len(subjects) > 1:
        progress.failure_table(failures, len(subjects))
    if failures:
        raise typer.Exit(2 if len(failures) == len(subjects) and not unforeseen else 1)


def _each(subjects: Sequence[Subject], request: Request, debug: bool) -> tuple[list[tuple[str, str]], bool]:
    """Segment one after another; which failed and why, and whether one did for another reason than its input."""
    failures: list[tuple[str, str]] = []
    unforeseen = False
    taken: dict[str, Subject] = {}
    for number, subject in enumerate(subjects, start=1):
        label = subject.stem if len(subjects) == 1 else f"{number}/{len(subjects)} {subject.stem}"
        try:
            twin = taken.get(subject.stem)
            if twin is not None:
                remedy = "rename one, or segment them into different folders"
                raise UnusableInput(subject.name, f"would have outputs of the same names as {twin.name}", remedy)
            taken[subject.stem] = subject
            if request.networks:
                said = _by_networks(subject, request, label)
            else:
                said = _summary(subject, segment_subject(subject, request, label), request.out)
        except Exception as error:  # a list goes on, whatever happened to one of its scans
            line = progress.failure_line(error, subject.name, debug)
            unforeseen |= not isinstance(error, UnusableInput)
            failures.append((subject.name, line))
            progress.say(line)
            continue
        if not request.quiet:
            typer.echo(said)
    return failures, unforeseen


def _networks(models: list[str], device: torch.device) -> tuple[Any, ...]:
    """Those whose folders are given, on a device; none for the generative model.

    Raises:
        UnusableInput: for what is neither, and for networks of different labels.
    """
    folders = [name for name in models if name != "segmentation"]
    if not folders:
        return ()
    unknown = [name for name in folders if not Path(name).is_dir()]
    if unknown:
        remedy = f"use one of: {', '.join(ZOO)}, or the folder of `probmed train segmentation` or `shapes`"
        raise UnusableInput(f"--model {unknown[0]}", "there is no such model", remedy)
    if len(folders) < len(models):
        remedy = "ask one or the others, and lay them side by side with `probmed compare`"
        raise UnusableInput("--model segmentation", "is a generative model, and beside it are networks", remedy)
    found = tuple(_trained(Path(name), device) for name in folders)
    for folder, network in zip(folders, found, strict=True):
        if network.names != found[0].names:
            raise UnusableInput(folder, "is a network for other labels than the first", "give networks of the same labels")
    return found


def _trained(folder: Path, device: torch.device) -> Any:
    """Of `probmed train segmentation`, or of `probmed train shapes`."""
    if (folder / "shapes.json").exists():
        shapes = importlib.import_module("probmed.workflows.shapes")
        return shapes.ShapeSegmenter(shapes.TrainedShapes.load(folder))
    trained = importlib.import_module("probmed.workflows.supervision").TrainedSegmenter.load(folder)
    trained.network.to(device)
    return trained


def _by_networks(subject: Subject, request: Request, label: str) -> str:
    """Segment one subject by the mean of networks, each several times where it has dropout or a latent; what was found, and where it is.

    Raises:
        UnusableInput: for several channels, a scan that cannot be used, and outputs that cannot be written.
    """
    if len(subject.channels) > 1:
        raise UnusableInput(subject.name, "has several channels, and networks take one", "give one scan a subject")
    names = request.networks[0].names
    check_outputs(request.out, with_sidecars(network_names(subject.stem, list(names.values()))), subject.stem, request.protect)
    with progress.collected_warnings([subject.name]) as lines, progress.progress_bar(label, request.quiet) as tell:
        scan = read_scan(subject.channels[0])
        found, errors = [], []
        for number, network in enumerate(request.networks):
            passes = request.draws if network.draws else 0
            p = network.probabilities(scan, passes, request.seed)
            found.append(p if passes else p[None])
            errors += [network.volume_errors] * max(1, passes)
            tell("segmenting", 0.9 * (number + 1) / len(request.networks))
        result = Labelled(scan, names, torch.cat(found), () if None in errors else errors)
        tell("writing", 0.9)
        provenance = Provenance.of(command_line(), request.seed, [subject.name], lines)
        page = network_page(result, provenance, subject.stem)
        write_network_segmentation(result, request.out, subject.stem, provenance, page, request.protect)
    if not request.quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
    volumes = ", ".join(f"{row['name']} {row['volume_ml']:.3g} ml" for row in result.volumes.to_dict("records"))
    return f"{subject.name}: {volumes}\n  {request.out / (subject.stem + '_report.html')}"


def segment_subject(
    subject: Subject,
    request: Request,
    label: str,
    truth: Any = None,
) -> SegmentationResult:
    """Segment one subject and write its outputs.

    Arguments:
        label: what the progress bar calls it.
        truth: a function of the result that gives the rows of ``segmentation_page``'s ``truth``, or None.

    Raises:
        UnusableInput: for scans that cannot be used and outputs that cannot be written.
    """
    paths = [str(path) for path in subject.channels]
    names = output_names(subject.stem, request.atlas.brain, len(paths), request.samples)
    check_outputs(request.out, names.values(), subject.stem, request.protect)
    with progress.collected_warnings(paths) as lines, progress.progress_bar(label, request.quiet) as tell:
        result = segmentation.segment(
            subject.channels,
            atlas=request.atlas,
            draws=request.draws,
            seed=request.seed,
            device=request.device,
            progress=lambda stage, share: tell(stage, 0.9 * share),
        )
        tell("writing", 0.9)
        provenance = Provenance.of(command_line(), request.seed, paths, lines)
        page = segmentation_page(result, provenance, subject.stem, None if truth is None else truth(result))
        write_segmentation(
            result,
            request.atlas,
            request.out,
            subject.stem,
            provenance,
            page,
            samples=request.samples,
            protect=request.protect,
        )
    if not request.quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
    return result


def _summary(subject: Subject, result: SegmentationResult, out: Path) -> str:
    """What was found, and where it is."""
    table = result.volumes[result.volumes["name"].isin(result.brain)]
    volumes = ", ".join(
        f"{row['name']} {row['volume_ml']:.0f} ml ({row['q025']:.0f}–{row['q975']:.0f})"
        for row in table.to_dict("records")
    )
    kind = "stripped brain" if result.stripped else "whole head"
    seconds = sum(result.seconds.values())
    return (
        f"{subject.name}: {kind}, {volumes}, quality {result.quality['score']:.2f}, {seconds:.0f} s"
        f"\n  {out / (subject.stem + '_report.html')}"
    )
