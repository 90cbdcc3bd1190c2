"""From an API key to a small language model of your own.

Ask a teacher, keep every answer, distil it, judge it, serve it.

The names below are found on first use, so that importing the package loads neither torch nor a provider's SDK.
"""
__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType

_HOMES = {
    'types': ['Completion', 'DistillError', 'Event', 'Message', 'TokenLogprobs', 'Usage'],
    'pricing': ['Budget', 'Price', 'estimate_cost', 'find_price', 'price', 'set_price'],
    'models': ['load_model', 'load_tokenizer'],
    'teachers.base': ['Teacher', 'register_teacher'],
    'teachers.registry': ['create_teacher', 'teacher_settings'],
    'cache': ['TeacherCache'],
    'prompts': ['read_prompts'],
    'records': ['Answer'],
    'answers': ['Answers', 'cached_answers', 'export_answers', 'read_answers'],
    'collect': ['acollect', 'cache_teacher_outputs', 'collect', 'outlook'],
    'align': ['Aligner'],
    'targets': ['LowCoverage', 'TargetMaker', 'make_examples', 'shift_check'],
    'shards': ['ShardWriter', 'Shards'],
    'capture': ['capture'],
    'device': ['device_report'],
    'importance': ['layer_importance', 'measure_importance'],
    'student': ['new_student', 'prune'],
    'saving': ['Card', 'load_student', 'save_student'],
    'train': ['DistillConfig', 'DistillTrainer'],
    'distill': ['Phase', 'quick_distill', 'train_phases'],
    'recipe': ['Recipe', 'follow', 'read_data'],
    'evaluate': ['Scores', 'difference', 'evaluate', 'write'],
    'details': ['Details', 'details'],
    'plots': ['plot_agreement_by_position', 'plot_cost_vs_quality', 'plot_curve', 'plot_entropy_vs_error',
              'plot_kl_by_topic', 'plot_reliability'],
    'judge': ['Speed', 'Verdicts', 'judge', 'speed', 'text_metrics'],
    'compare': ['compare'],
    'serving.process': ['Server', 'run_server', 'serve'],
    'tuning.process': ['run_tunings', 'serve_tunings'],
    'tuning.aclient': ['AsyncTuningClient'],
    'tuning.client': ['TuningClient'],
    'progress': ['Progress', 'tuning_event', 'watch_server'],
    'demo': ['demo_prompts', 'run_demo'],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_HOME[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "Keeps `llm_distill.collect` the function: importing a submodule would set the module of that name here."
    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, ModuleType)): super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
