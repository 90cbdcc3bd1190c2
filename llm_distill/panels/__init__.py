"""Everything by mouse: panels for notebooks, each usable alone, and `Studio`, which joins them over one folder."""
from importlib import import_module

_HOME = {'TeacherPanel': 'teacher', 'CollectPanel': 'collect', 'DistillPanel': 'distill', 'EvaluatePanel': 'evaluate',
         'ChatPanel': 'chat', 'ServePanel': 'serve', 'JobsPanel': 'jobs', 'Studio': 'studio'}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_HOME[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
