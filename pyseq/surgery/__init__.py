"""Models taken apart and put together again: modules that are used several times become independent ones, and back."""

from pyseq.surgery._drift import drift_report as drift_report
from pyseq.surgery._unshare import reshare as reshare
from pyseq.surgery._unshare import unshare as unshare

__all__ = ["drift_report", "reshare", "unshare"]
