"Providers to test against: real HTTP servers on 127.0.0.1 that keep to their protocols, and fail on demand."
from .faults import Fault
from .limiter import Limiter
from .ports import free_port, hanging_port
from .wire import Provider, Seen

__all__ = ['Fault', 'Limiter', 'Provider', 'Seen', 'free_port', 'hanging_port']
