"""The report of trained networks: one HTML page that needs no other file.

command.py is `mrcn-fast report`, page.py makes the page from features and journals, and charts.py draws its
charts. page.html is the template. `mrcn-fast demo` ends with the same page.
"""

from mrcn_fast.reid.report.charts import BlockTimes
from mrcn_fast.reid.report.command import ReportOptions, write_report
from mrcn_fast.reid.report.page import Network, Subject, choose_subject, write_page

__all__ = [
    "BlockTimes",
    "Network",
    "ReportOptions",
    "Subject",
    "choose_subject",
    "write_page",
    "write_report",
]
