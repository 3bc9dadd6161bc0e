"""The proxy's settings: a module for each subject's flags, one object with all of them, one reader.

Only `load` reads the environment and files. Precedence: flags, then TRIPTYCH_…, then the file of --config.
"""

from proxy.settings.endpoint import Endpoint
from proxy.settings.load import Sources, Wrong, load, refuse
from proxy.settings.proxy import ProxySettings

__all__ = ["Endpoint", "ProxySettings", "Sources", "Wrong", "load", "refuse"]
