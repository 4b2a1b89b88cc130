"""Reports: pages for a segmented scan, a registered pair and a template, that need nothing else, neither files nor a network."""

from probmed.report.pages import registration_page, segmentation_page, template_page

__all__ = ["registration_page", "segmentation_page", "template_page"]
