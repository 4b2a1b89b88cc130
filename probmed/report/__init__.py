"""Reports: pages for a segmented scan, a registered pair, a template and rates of change, that need nothing else, neither files nor a network."""

from probmed.report.pages import (
    codes_page,
    comparison_page,
    growth_page,
    network_page,
    rates_page,
    registration_page,
    segmentation_page,
    template_page,
)

__all__ = [
    "codes_page",
    "comparison_page",
    "growth_page",
    "network_page",
    "rates_page",
    "registration_page",
    "segmentation_page",
    "template_page",
]
