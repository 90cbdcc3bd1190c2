"A model of a few thousand weights a layer that knows nothing, for tests of what goes around models."
from pathlib import Path


def small_student(folder: Path) -> str:
    "Where it was saved."
    import torch
    from llm_distill.models import find_model, load_tokenizer
    from llm_distill.saving import save_student
    from llm_distill.student import new_student
    tokenizer = load_tokenizer(find_model('smollm2'))
    sizes = {'num_hidden_layers': 2, 'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 2,
             'num_key_value_heads': 2}
    torch.manual_seed(0)
    return str(save_student(new_student({'model_type': 'llama', **sizes}, tokenizer), tokenizer, folder/'student'))
