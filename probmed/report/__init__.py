"""Reports: pages for a segmented scan, a registered pair, a template and rates of change, that need nothing else, neither files nor a network."""

from probmed.report.pages import rates_page, registration_page, segmentation_page, template_page

__all__ = ["rates_page", "registration_page", "segmentation_page", "template_page"]
