"""Reuse of layers and models: parts, copies, edits with a way back, sharing that can be seen, and un-sharing."""

from pyseq.surgery._clone import clone as clone
from pyseq.surgery._drift import drift_report as drift_report
from pyseq.surgery._edits import insert_after as insert_after
from pyseq.surgery._edits import remove as remove
from pyseq.surgery._edits import replace as replace
from pyseq.surgery._state import load_state_dict as load_state_dict
from pyseq.surgery._state import state_dict as state_dict
from pyseq.surgery._submodel import nodes as nodes
from pyseq.surgery._submodel import rerun as rerun
from pyseq.surgery._submodel import submodel as submodel
from pyseq.surgery._ties import SharingReport as SharingReport
from pyseq.surgery._ties import share as share
from pyseq.surgery._ties import sharing_report as sharing_report
from pyseq.surgery._undo import Edit as Edit
from pyseq.surgery._unshare import reshare as reshare
from pyseq.surgery._unshare import unshare as unshare

__all__ = [
    "Edit",
    "SharingReport",
    "clone",
    "drift_report",
    "insert_after",
    "load_state_dict",
    "nodes",
    "remove",
    "replace",
    "rerun",
    "reshare",
    "share",
    "sharing_report",
    "state_dict",
    "submodel",
    "unshare",
]
