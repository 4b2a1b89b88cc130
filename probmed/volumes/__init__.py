"""Volumes: scans and label maps on disk, and the same as tensors placed in the world.

Read: NIfTI-1 and NIfTI-2 in one file (``.nii``, ``.nii.gz``, recognised by content) and FreeSurfer's ``.mgh``
and ``.mgz``; two or three axes, any trailing axes of size 1, any axis order, oblique affines, any scalar
type, ``scl_slope`` and ``scl_inter``.

Which affine: the sform where its code is positive, else the qform where its code is positive, else the
spacing alone, with a warning: such a file does not say where the head is, so the origin is put at the centre
of the image and the first axis is taken to run from right to left, nibabel's (and SPM's and FSL's)
convention. Header units of metres or microns are converted to millimetres, with a warning.

Written: the geometry of the volume given as ``like``, field by field, in a header whose voxel type is that
of the data and whose slope is 1, so that nothing is ever rescaled. Files appear whole or not at all, have the
same bytes for the same data, and never replace an input.

Reference: the NIfTI-1 and NIfTI-2 definitions (nifti.nimh.nih.gov); FreeSurfer's MghFormat page.
"""

from probmed.volumes.files import UnusableInput, atomic_write, bids_stem, sha256
from probmed.volumes.names import read_label_colours, read_label_names, write_label_names
from probmed.volumes.scans import Volume, foreground_unit, read_labels, read_scan, scaled, write_labels, write_scan

__all__ = [
    "UnusableInput",
    "Volume",
    "atomic_write",
    "bids_stem",
    "foreground_unit",
    "read_label_colours",
    "read_label_names",
    "read_labels",
    "read_scan",
    "scaled",
    "sha256",
    "write_label_names",
    "write_labels",
    "write_scan",
]
