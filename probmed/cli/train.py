"""`probmed train`: models that are fitted to a table once, and used on others later."""

from __future__ import annotations

import typer

from probmed.cli.train_gp_prior_vae import gp_prior_vae
from probmed.cli.train_longitudinal import longitudinal
from probmed.cli.train_registration import registration
from probmed.cli.train_segmentation import segmentation
from probmed.cli.train_shapes import shapes

app = typer.Typer(no_args_is_help=True, help="Fit a model to a table of scans or visits.", rich_markup_mode="rich")
app.command()(registration)
app.command()(segmentation)
app.command()(shapes)
app.command()(longitudinal)
app.command()(gp_prior_vae)
