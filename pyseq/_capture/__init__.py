"""A forward pass as a graph of named nodes, for surgery and initialisation.

The model runs on an example, in training and in evaluation mode, and its Python code sees stand-ins that
carry the real tensors and sizes: what it computes with them is recorded, and a branch that hangs on a tensor's values
cannot be. Modules of torch, and those whose code cannot be recorded, are nodes as they are, unless asked to be opened.
"""

from pyseq._capture._graph import arguments as arguments
from pyseq._capture._graph import capture as capture
from pyseq._capture._graph import flipped as flipped
from pyseq._capture._graph import signature as signature
from pyseq._capture._graph import untouched as untouched
from pyseq._capture._trace import LOCK as LOCK
from pyseq._capture._trace import SIZES as SIZES
from pyseq._capture._trace import VALUES as VALUES
from pyseq._capture._trace import Frame as Frame
from pyseq._capture._trace import instead as instead
from pyseq._capture._trace import of_torch as of_torch
from pyseq._capture._values import Built as Built
from pyseq._capture._values import Flag as Flag
from pyseq._capture._values import Graph as Graph
from pyseq._capture._values import Held as Held
from pyseq._capture._values import Node as Node
from pyseq._capture._values import Uncapturable as Uncapturable
from pyseq._capture._values import leaves as leaves
from pyseq._capture._values import mapped as mapped
from pyseq._capture._values import place as place
from pyseq._capture._values import version as version
