"""The report of a segmented scan: one page that needs nothing else, neither files nor a network."""

from probmed.report.pages import segmentation_page

__all__ = ["segmentation_page"]
