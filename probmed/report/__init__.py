"""Reports: one page for a segmented scan and one for a registered pair, that need nothing else, neither files nor a network."""

from probmed.report.pages import registration_page, segmentation_page

__all__ = ["registration_page", "segmentation_page"]
