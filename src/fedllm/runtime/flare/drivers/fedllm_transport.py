"""FLARE runs this file when it loads its drivers, after its own: ours take their places.

FLARE knows its addresses by a few names only, so there is none of ours for the one between machines.
"""

from nvflare.fuel.f3.communicator import driver_mgr

from fedllm.runtime.flare import transport

driver_mgr.drivers |= dict.fromkeys(transport.TlsDriver.supported_transports(), transport.TlsDriver)
driver_mgr.drivers |= dict.fromkeys(transport.LocalDriver.supported_transports(), transport.LocalDriver)
