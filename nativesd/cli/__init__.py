"""The command line: the only package that knows about terminals.

Exit codes: 0 fine, 1 findings, 2 usage, 3 unreadable or unfit input, 4 network,
130 interrupted.
"""

from nativesd.cli import batch as batch
from nativesd.cli import checkpoints as checkpoints
from nativesd.cli import generate as generate
from nativesd.cli import graphs as graphs
from nativesd.cli import machine as machine
from nativesd.cli import pictures as pictures
from nativesd.cli import serve as serve
from nativesd.cli import stream as stream
from nativesd.cli import workshop as workshop
from nativesd.cli.common import main as main
from nativesd.cli.common import run as run
