"""`probmed register`: one image onto another, with the uncertainty of the deformation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
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
    given_options,
    load_amortisation,
    load_networks,
    make_folder,
)
from probmed.report import registration_page
from probmed.volumes import UnusableInput, Volume, bids_stem, read_scan
from probmed.workflows import registration
from probmed.workflows.correspondences import read_label_pair, read_landmarks
from probmed.workflows.propagation import Propagation, called, propagate, read_mask, read_moving_labels, table_beside
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import Amortised, PointPairs, RegistrationResult, RegistrationSettings
from probmed.workflows.registration_outputs import check_registration_outputs, registration_names, write_registration


class SimilarityName(str, Enum):
    """The likelihood; ``workflows.registration_fit.SIMILARITIES``."""

    correlation = "correlation"
    gaussian = "gaussian"
    student = "student"
    mixture = "mixture"


Moving = Annotated[
    Path, typer.Argument(metavar="MOVING", help="Image to bring over: NIfTI or MGH, 2D or 3D. It gives the names of the outputs.")
]
Fixed = Annotated[Path, typer.Argument(metavar="FIXED", help="Image to bring it onto. It gives the grid of the outputs.")]
SimilarityOption = Annotated[
    SimilarityName,
    typer.Option(help="Likelihood of the fixed image: local correlation, Gaussian or Student's t noise, or mixture for different contrasts."),
]
AffineOption = Annotated[
    str | None,
    typer.Option(
        metavar="[N|none]",
        help="Parameters of the affine map: 6 rigid, 7 similarity, 12 affine; in 2D 3, 4, 6; none trusts the headers. All if not given.",
        show_default=False,
    ),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="Label map of the moving image, to be carried. A .tsv beside it, with columns index and name, names them.", show_default=False
    ),
]
MaskOption = Annotated[Path | None, typer.Option(help="Mask of the fixed image: match the images only where it is not 0.", show_default=False)]
MovingMaskOption = Annotated[
    Path | None, typer.Option(help="Mask of the moving image: where it is 0, the image is ignored, but still carried.", show_default=False)
]
LandmarksOption = Annotated[
    Path | None,
    typer.Option(
        metavar="TABLE",
        help="Points that correspond: a .tsv or .csv with columns fixed_x, fixed_y, fixed_z, moving_x, moving_y, moving_z, mm, RAS.",
        show_default=False,
    ),
]
MatchLabelsOption = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="MOVING FIXED",
        help="Label maps of both images, of one scheme, that are to agree: a second likelihood beside the images'.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Folder of `probmed train registration`: its network answers at once.", show_default=False)
]

_OF_A_FIT = ("similarity", "affine", "no_deformation", "symmetric", "apart", "learn_prior", "landmarks", "landmark_sd", "match_labels")
"""Options that mean nothing to a network."""


@dataclass(frozen=True)
class _Paths:
    """Files of a request."""

    moving: Path
    fixed: Path
    labels: Path | None
    mask: Path | None
    moving_mask: Path | None
    landmarks: Path | None
    match_labels: tuple[Path, Path] | None
    model: Path | None

    @property
    def all(self) -> tuple[Path, ...]:
        """Those that are read, with a table that names the labels and a network's weights."""
        beside = None if self.labels is None or not table_beside(self.labels).exists() else table_beside(self.labels)
        weights = None if self.model is None else self.model / "network.safetensors"
        named = (self.moving, self.fixed, self.labels, beside, self.mask, self.moving_mask, self.landmarks, *(self.match_labels or ()), weights)
        return tuple(path for path in named if path is not None)


@dataclass(frozen=True)
class _Inputs:
    """What was read: the pair, labels of the moving image with their names, where each image counts, what is known to correspond, a trained network,
    and its objective where that gives no posterior."""

    moving: Volume
    fixed: Volume
    labels: Volume | None
    names: dict[int, str]
    mask: Tensor | None
    moving_mask: Tensor | None
    landmarks: PointPairs | None
    matched: tuple[Tensor, Tensor] | None
    network: Any
    pointwise: str | None

    def amortised(self, refine: int, seed: int) -> Amortised | None:
        """The network's answers."""
        if self.network is None:
            return None
        return partial(load_amortisation().answer, self.network, refine=refine, seed=seed, evaluate=True)


def register(
    context: typer.Context,
    moving: Moving,
    fixed: Fixed,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    similarity: SimilarityOption = SimilarityName.correlation,
    affine: AffineOption = None,
    no_deformation: Annotated[bool, typer.Option("--no-deformation", help="The affine map alone; there are no draws then.")] = False,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Let both images explain each other, at twice the time.")] = False,
    apart: Annotated[bool, typer.Option("--apart", help="The headers place the images apart: start from their centres of mass.")] = False,
    learn_prior: Annotated[
        bool, typer.Option("--learn-prior", help="Learn how much and how smoothly the images deform, by the evidence of this pair.")
    ] = False,
    labels: LabelsOption = None,
    mask: MaskOption = None,
    moving_mask: MovingMaskOption = None,
    landmarks: LandmarksOption = None,
    landmark_sd: Annotated[float, typer.Option(metavar="MM", help="How accurately landmarks are placed, on each axis.")] = 1.0,
    match_labels: MatchLabelsOption = None,
    draws: Annotated[int, typer.Option(min=0, max=10_000, help="Of the deformation's posterior, behind the sd and the volumes' intervals.")] = 20,
    save_draws: Annotated[int, typer.Option(min=0, max=999, help="How many of the draws to write as warps.")] = 0,
    model: ModelOption = None,
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
    paths = _Paths(moving, fixed, labels, mask, moving_mask, landmarks, match_labels, model)
    with progress.in_one_line(str(moving), debug) as made:
        check_device(device)
        _check_options(given_options(context), model is not None, no_deformation, landmark_sd, refine)
        settings = RegistrationSettings(
            similarity=similarity.value,
            affine=_parameters(affine),
            deformable=not no_deformation,
            landmark_sd_mm=landmark_sd,
            symmetric=symmetric,
            apart=apart,
            learn_prior=learn_prior,
        )
        draws = 0 if no_deformation else draws
        if save_draws > draws:
            raise UnusableInput(f"--save-draws {save_draws}", f"is more than the {draws} draws", "raise --draws")
        made += make_folder(out)
        texts = [str(path) for path in paths.all]
        with progress.collected_warnings(texts) as lines, progress.progress_bar(stem, quiet) as tell:
            inputs = _read(paths)
            draws = _possible_draws(inputs, model, draws, save_draws, refine, lines)
            names = () if inputs.labels is None else called(inputs.labels, inputs.names)
            planned = registration_names(stem, names, draws, save_draws, inputs.labels is not None)
            check_registration_outputs(out, planned, stem, paths.all)
            result = registration.register(
                inputs.moving,
                inputs.fixed,
                draws=draws,
                seed=seed,
                device=device.value,
                settings=settings,
                mask=inputs.mask,
                moving_mask=inputs.moving_mask,
                landmarks=inputs.landmarks,
                labels=inputs.matched,
                amortised=inputs.amortised(refine, seed),
                progress=lambda stage, share: tell(stage, 0.8 * share),
            )
            tell("labels" if inputs.labels else "writing", 0.8)
            propagation = None if inputs.labels is None else propagate(inputs.labels, result, inputs.names)
            tell("writing", 0.9)
            provenance = Provenance.of(command_line(), seed, texts, lines)
            page = registration_page(result, provenance, f"{stem} to {bids_stem(fixed)}", propagation)
            write_registration(result, out, stem, provenance, page, propagation=propagation, samples=save_draws, protect=paths.all)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        typer.echo(_summary(result, propagation, stem, out))


def _check_options(given: Iterable[str], network: bool, no_deformation: bool, landmark_sd: float, refine: int) -> None:
    """Refuse options that do not go together, before anything is read.

    Arguments:
        given: names of the parameters that the command line has.
    """
    if not landmark_sd > 0:
        raise UnusableInput(f"--landmark-sd {landmark_sd:g}", "is no positive number", "give millimetres")
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if network and name in _OF_A_FIT:
            raise UnusableInput(option, "is for a fit, in whose place --model has a network", f"leave out {option} or --model")
        if no_deformation and name in ("landmarks", "match_labels", "learn_prior"):
            fault = "is for the deformation's fit, which --no-deformation leaves out"
            raise UnusableInput(option, fault, f"leave out {option} or --no-deformation")
    if refine and not network:
        raise UnusableInput(f"--refine {refine}", "is for a network's answer", "give its folder with --model")


def _possible_draws(inputs: _Inputs, model: Path | None, draws: int, save_draws: int, refine: int, lines: list[str]) -> int:
    """How many draws there can be; a network without a posterior has none, which is said."""
    if inputs.pointwise is None or not draws or refine:
        return draws
    fault = f"was trained by {inputs.pointwise} and has no posterior"
    if save_draws:
        raise UnusableInput(str(model), fault, "leave out --save-draws, or --refine it")
    lines.append(f"{model}: {fault}: no draws, no standard deviation (--refine gives both)")
    return 0


def _read(paths: _Paths) -> _Inputs:
    """Read all inputs, and refuse what cannot be used before any work."""
    m, f = read_scan(paths.moving), read_scan(paths.fixed)
    carried, names = (None, {}) if paths.labels is None else read_moving_labels(paths.labels, m)
    inside, moving_inside = (_part(path, volume) for path, volume in ((paths.mask, f), (paths.moving_mask, m)))
    network = pointwise = None
    if paths.model is not None:
        networks = load_networks()
        network = networks.TrainedRegistration.load(paths.model)
        pointwise = network.settings.objective if network.settings.objective in networks.POINT_OBJECTIVES else None
    points = None if paths.landmarks is None else read_landmarks(paths.landmarks, m, f)
    matched = None if paths.match_labels is None else read_label_pair(paths.match_labels, m, f)
    return _Inputs(m, f, carried, names, inside, moving_inside, points, matched, network, pointwise)


def _part(path: Path | None, volume: Volume) -> Tensor | None:
    """Where an image counts, ``(*shape)`` bool."""
    if path is None:
        return None
    inside = read_mask(path, volume)
    if float(volume.data[inside].min()) == float(volume.data[inside].max()):
        raise UnusableInput(volume.name, f"is constant inside {path}", "give a mask of a part that shows something")
    return inside


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
    if result.elbo_network is not None:
        parts.append(f"ELBO of the network's answer {result.elbo_network:.1f} nats")
    if result.refinement is not None:
        parts.append(f"refined by {result.refinement.gap:.1f} ± {result.refinement.error:.1f} nats")
    if propagation is not None:
        for row in propagation.volumes.head(4).to_dict("records"):
            interval = f" ({row['q025']:.3g}–{row['q975']:.3g})" if row["q025"] == row["q025"] else ""
            parts.append(f"{row['name']} {row['volume_ml']:.3g} ml{interval}")
    parts.append(f"{sum(result.seconds.values()):.0f} s")
    return f"{result.moving.name} to {result.fixed.name}: {', '.join(parts)}\n  {out / (stem + '_report.html')}"
