"""`probmed register`: one image onto another, with the uncertainty of the deformation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from probmed.cli import progress
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    QuietOption,
    SeedOption,
    check_device,
    command_line,
    load_amortisation,
    make_folder,
)
from probmed.report import registration_page
from probmed.volumes import UnusableInput, Volume, bids_stem, read_scan
from probmed.workflows import registration
from probmed.workflows.correspondences import read_label_pair, read_landmarks
from probmed.workflows.propagation import Propagation, called, propagate, read_mask, read_moving_labels, table_beside
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import PointPairs, RegistrationResult, RegistrationSettings
from probmed.workflows.registration_outputs import check_registration_outputs, registration_names, write_registration


class SimilarityName(str, Enum):
    """The likelihood; ``workflows.registration.SIMILARITIES``."""

    correlation = "correlation"
    gaussian = "gaussian"
    student = "student"
    mixture = "mixture"


@dataclass(frozen=True)
class _Inputs:
    """What was read of a request: the pair, labels of the moving image with their names, where the fixed one counts, what is known to correspond,
    a network's answer, and its objective where that gives no posterior."""

    moving: Volume
    fixed: Volume
    labels: Volume | None
    names: dict[int, str]
    mask: Tensor | None
    landmarks: PointPairs | None
    matched: tuple[Tensor, Tensor] | None
    amortised: Callable[..., Any] | None
    pointwise: str | None


def register(
    moving: Annotated[
        Path,
        typer.Argument(metavar="MOVING", help="Image to bring over: NIfTI or MGH, 2D or 3D. It gives the names of the outputs."),
    ],
    fixed: Annotated[Path, typer.Argument(metavar="FIXED", help="Image to bring it onto. It gives the grid of the outputs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    similarity: Annotated[
        SimilarityName,
        typer.Option(help="Likelihood of the fixed image: local correlation, Gaussian or Student's t noise, or mixture for different contrasts."),
    ] = SimilarityName.correlation,
    affine: Annotated[
        str | None,
        typer.Option(
            metavar="[N|none]",
            help="Parameters of the affine map: 6 rigid, 7 similarity, 12 affine; in 2D 3, 4, 6; none trusts the headers. All if not given.",
            show_default=False,
        ),
    ] = None,
    no_deformation: Annotated[bool, typer.Option("--no-deformation", help="The affine map alone; there are no draws then.")] = False,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Let both images explain each other: neither is the reference. Twice the time.")
    ] = False,
    apart: Annotated[
        bool, typer.Option("--apart", help="The headers place the images apart: bring them together from their centres of mass.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Label map of the moving image, to be carried. A .tsv beside it, with columns index and name, names them.",
            show_default=False,
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Mask of the fixed image: match the images only where it is not 0.", show_default=False)
    ] = None,
    landmarks: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Points that correspond: a .tsv or .csv with columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z, mm, RAS.",
            show_default=False,
        ),
    ] = None,
    landmark_sd: Annotated[float, typer.Option(metavar="MM", help="How accurately landmarks are placed, on each axis.")] = 1.0,
    match_labels: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="MOVING FIXED",
            help="Label maps of both images, of one scheme, that are to agree: a second likelihood beside the images'.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, max=10_000, help="Of the deformation's posterior, behind the sd and the volumes' intervals.")] = 20,
    save_draws: Annotated[int, typer.Option(min=0, max=999, help="How many of the draws to write as warps.")] = 0,
    model: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of `probmed train registration`: its network answers at once.", show_default=False)
    ] = None,
    refine: Annotated[int, typer.Option(min=0, help="With --model: steps by which its answer is refined on this pair.")] = 0,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Register one image to another: affine map, diffeomorphism, and how sure they are.

    Of a.nii.gz onto b.nii.gz it writes, all or nothing: a_desc-moved.nii.gz (on the voxels of b), warps for ITK and ANTs
    a_from-moving_to-fixed_mode-image_xfm.nii.gz and _from-fixed_to-moving_mode-image_xfm (affine map included), the affine
    map alone (.mat), _desc-jacobian, _desc-sd (of the displacement, mm), with --labels _dseg, _label-X_probseg and
    _volumes.tsv, then _registration.tsv, a JSON file beside each, and _report.html.

    [bold]Examples[/bold]

        probmed register sub-01_T1w.nii.gz sub-02_T1w.nii.gz -o out

        probmed register sub-01_T1w.nii.gz sub-02_T1w.nii.gz --labels sub-01_dseg.nii.gz -o out

        probmed register sub-01_T1w.nii.gz sub-02_T1w.nii.gz --landmarks points.tsv --landmark-sd 1.5 -o out

        probmed register sub-01_T2w.nii.gz sub-01_T1w.nii.gz --similarity mixture --affine 6 --no-deformation -o out
    """
    stem = bids_stem(moving)
    beside = None if labels is None or not table_beside(labels).exists() else table_beside(labels)
    weights = None if model is None else model / "network.safetensors"
    paths = tuple(path for path in (moving, fixed, labels, beside, mask, landmarks, *(match_labels or ()), weights) if path is not None)
    texts = [str(path) for path in paths]
    with progress.in_one_line(str(moving), debug) as made:
        check_device(device)
        settings = RegistrationSettings(
            similarity=similarity.value,
            affine=_parameters(affine),
            deformable=not no_deformation,
            landmark_sd_mm=landmark_sd,
            symmetric=symmetric,
            apart=apart,
        )
        if not landmark_sd > 0:
            raise UnusableInput(f"--landmark-sd {landmark_sd:g}", "is no positive number", "give millimetres")
        for option, given in (("--landmarks", landmarks), ("--match-labels", match_labels)):
            if given is not None and (no_deformation or model is not None):
                other = "--no-deformation" if no_deformation else "--model"
                raise UnusableInput(option, f"is for the deformation's fit, which {other} leaves out", f"leave out {option} or {other}")
        if no_deformation and model is None:
            draws = 0
        if save_draws > draws:
            raise UnusableInput(f"--save-draws {save_draws}", f"is more than the {draws} draws", "raise --draws")
        if refine and model is None:
            raise UnusableInput(f"--refine {refine}", "is for a network's answer", "give its folder with --model")
        made += make_folder(out)
        with progress.collected_warnings(texts) as lines, progress.progress_bar(stem, quiet) as tell:
            inputs = _read(moving, fixed, labels, mask, landmarks, match_labels, model)
            if inputs.pointwise is not None and draws and not refine:
                fault = f"was trained by {inputs.pointwise} and has no posterior"
                if save_draws:
                    raise UnusableInput(str(model), fault, "leave out --save-draws, or --refine it")
                lines.append(f"{model}: {fault}: no draws, no standard deviation (--refine gives both)")
                draws = 0
            names = () if inputs.labels is None else called(inputs.labels, inputs.names)
            planned = registration_names(stem, names, draws, save_draws, inputs.labels is not None)
            check_registration_outputs(out, planned, stem, paths)
            answer = inputs.amortised
            result = registration.register(
                inputs.moving,
                inputs.fixed,
                draws=draws,
                seed=seed,
                device=device.value,
                settings=settings,
                mask=inputs.mask,
                landmarks=inputs.landmarks,
                labels=inputs.matched,
                amortised=None if answer is None else lambda m, f, n: answer(m, f, draws=n, refine=refine, seed=seed),
                progress=lambda stage, share: tell(stage, 0.8 * share),
            )
            tell("labels" if inputs.labels else "writing", 0.8)
            propagation = None if inputs.labels is None else propagate(inputs.labels, result, inputs.names)
            tell("writing", 0.9)
            provenance = Provenance.of(command_line(), seed, texts, lines)
            page = registration_page(result, provenance, f"{stem} to {bids_stem(fixed)}", propagation)
            write_registration(
                result, out, stem, provenance, page, propagation=propagation, samples=save_draws, protect=paths
            )
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        typer.echo(_summary(result, propagation, stem, out))


def _read(
    moving: Path,
    fixed: Path,
    labels: Path | None,
    mask: Path | None,
    landmarks: Path | None,
    match_labels: tuple[Path, Path] | None,
    model: Path | None,
) -> _Inputs:
    """Read all inputs, and refuse what cannot be used before any work."""
    m, f = read_scan(moving), read_scan(fixed)
    carried, names = (None, {}) if labels is None else read_moving_labels(labels, m)
    inside = None if mask is None else read_mask(mask, f)
    if inside is not None and float(f.data[inside].min()) == float(f.data[inside].max()):
        raise UnusableInput(fixed, f"is constant inside {mask}", "give a mask of a part that shows something")
    amortised = pointwise = None
    if model is not None:
        amortisation = load_amortisation()
        trained = amortisation.TrainedRegistration.load(model)
        pointwise = trained.settings.objective if trained.settings.objective in amortisation.POINT_OBJECTIVES else None

        def amortised(*pair: Volume, **options: Any) -> Any:
            return amortisation.answer(trained, *pair, **options)

    points = None if landmarks is None else read_landmarks(landmarks, m, f)
    matched = None if match_labels is None else read_label_pair(match_labels, m, f)
    return _Inputs(m, f, carried, names, inside, points, matched, amortised, pointwise)


def _parameters(text: str | None) -> int | None:
    """What --affine asks for: a number, 0 for none, None for all."""
    if text is None or text.lower() == "none":
        return None if text is None else 0
    if not text.isdecimal() or int(text) == 0:
        raise UnusableInput(f"--affine {text}", "is neither a number of parameters nor none", "give 6, 7 or 12, in 2D 3, 4 or 6, or none")
    return int(text)


def _summary(result: RegistrationResult, propagation: Propagation | None, stem: str, out: Path) -> str:
    """What was found, and where it is."""
    before, _, after = (f"{value:.3f}" if value == value else "n/a" for value in result.correlation)
    parts = [f"correlation {before} → {after}", f"{100 * result.folding:.2g} % folded"]
    if result.settings.similarity == "mixture":
        parts[0] = f"mutual information {result.information[0]:.3f} → {result.information[2]:.3f} nats"
    if result.landmark_error is not None:
        parts.append(f"landmarks {result.landmark_error[0]:.2f} → {result.landmark_error[2]:.2f} mm apart")
    if propagation is not None:
        for row in propagation.volumes.head(4).to_dict("records"):
            interval = f" ({row['q025']:.3g}–{row['q975']:.3g})" if row["q025"] == row["q025"] else ""
            parts.append(f"{row['name']} {row['volume_ml']:.3g} ml{interval}")
    parts.append(f"{sum(result.seconds.values()):.0f} s")
    return f"{result.moving.name} to {result.fixed.name}: {', '.join(parts)}\n  {out / (stem + '_report.html')}"
