"Ports where nobody answers."
import socket
from contextlib import contextmanager


def free_port() -> int:
    "A port where nothing listens: a connect is refused."
    with socket.create_server(('127.0.0.1', 0)) as listener: return listener.getsockname()[1]


@contextmanager
def hanging_port():
    "A port whose backlog is full and that never accepts: a connect hangs."
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        try:
            for filler in fillers:
                filler.settimeout(.2)
                try: filler.connect(listener.getsockname())
                except OSError: break
            yield listener.getsockname()[1]
        finally:
            for filler in fillers: filler.close()
