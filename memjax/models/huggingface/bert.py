"""BERT and RoBERTa with their heads.

The architecture says what the head is for: `...ForSequenceClassification` (regression where that is
its problem, or where there is one label), `...ForQuestionAnswering`, anything else is an embedding.
A head that `transformers` has no class for, on the mean over tokens, is kept under its usual name
beside a bare encoder, and the config says so in a group of our own that bare encoders have.
"""

from typing import Any

from memjax.models.bert import Bert
from memjax.models.huggingface.family import Config, Family, Name, layer_norm, linear

OURS = 'memjax'  # Group of the config that says what an architecture cannot.
PROBLEMS = (None, 'single_label_classification', 'regression')


def _to_model(config: Config, **fields: Any) -> Bert:
  config.check('hidden_act', 'gelu')
  config.check('position_embedding_type', 'absolute')
  config.check('is_decoder', False)
  task, architecture = _task(config), (config.get('architectures') or [''])[0]
  ours = {'task': task, 'pool': 'mean' if task == 'embedding' else 'first'}
  ours |= config.get(OURS, {}) if architecture.endswith('Model') else {}
  return Bert(
    vocab=config['vocab_size'],
    hidden=config['hidden_size'],
    intermediate=config['intermediate_size'],
    heads=config['num_attention_heads'],
    layers=config['num_hidden_layers'],
    types=config.either('type_vocab_size', 2),
    norm_eps=config.either('layer_norm_eps', 1e-12),
    labels=_labels(config) if ours['task'] == 'classification' else 2,
    **ours,
    **fields,
  )


def _bert(config: Config) -> Bert:
  positions = config.either('max_position_embeddings', 512)
  return _to_model(config, positions=positions, offset=0, pad_id=config.either('pad_token_id', 0))


def _roberta(config: Config) -> Bert:
  """Its table of positions begins with as many unused rows as there are ids up to the padding's."""
  pad = config.either('pad_token_id', 1)
  positions = config.either('max_position_embeddings', 514) - pad - 1
  return _to_model(config, positions=positions, offset=pad + 1, pad_id=pad)


def _labels(config: Config) -> int:
  names = config.get('id2label')
  return len(names) if names else config.either('num_labels', 2)


def _task(config: Config) -> str:
  architecture = (config.get('architectures') or [''])[0]
  if architecture.endswith('ForQuestionAnswering'):
    return 'span'
  if not architecture.endswith('ForSequenceClassification'):
    return 'embedding'
  config.check('problem_type', *PROBLEMS)
  problem = config.get('problem_type')
  numeric = problem == 'regression' or (problem is None and _labels(config) == 1)
  return 'regression' if numeric else 'classification'


def _to_config(model: Bert, kind: str, prefix: str) -> dict[str, Any]:
  bare = model.task == 'embedding' or (model.pool == 'mean' and model.task != 'span')
  head = 'ForQuestionAnswering' if model.task == 'span' else 'ForSequenceClassification'
  labels = {'classification': model.labels, 'regression': 1}.get(model.task, 2)
  return {
    'architectures': [prefix + ('Model' if bare else head)],
    'model_type': kind,
    'vocab_size': model.vocab,
    'hidden_size': model.hidden,
    'intermediate_size': model.intermediate,
    'num_attention_heads': model.heads,
    'num_hidden_layers': model.layers,
    'max_position_embeddings': model.positions + model.offset,
    'type_vocab_size': model.types,
    'pad_token_id': model.pad_id,
    'layer_norm_eps': model.norm_eps,
    'hidden_act': 'gelu',
    'id2label': {str(i): f'LABEL_{i}' for i in range(labels)},
    'label2id': {f'LABEL_{i}': i for i in range(labels)},
    'problem_type': 'regression' if model.task == 'regression' else None,
    **({OURS: {'task': model.task, 'pool': model.pool}} if bare else {}),
  }


def _names(model: Bert, prefix: str, dense: str, out: str) -> tuple[Name, ...]:
  embeddings, layer = f'{prefix}.embeddings', f'{prefix}.encoder.layer.{{layer}}'
  maps = {
    'attn/q': 'attention.self.query',
    'attn/k': 'attention.self.key',
    'attn/v': 'attention.self.value',
    'attn/o': 'attention.output.dense',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
  }
  return (
    Name('embed/embedding', f'{embeddings}.word_embeddings.weight'),
    Name('embed/positions/embedding', f'{embeddings}.position_embeddings.weight'),
    Name('embed/types/embedding', f'{embeddings}.token_type_embeddings.weight'),
    *layer_norm('embed/norm', f'{embeddings}.LayerNorm'),
    *(
      name
      for ours, theirs in maps.items()
      for name in linear(f'blocks/{ours}', f'{layer}.{theirs}', bias=True)
    ),
    *layer_norm('blocks/attn_norm', f'{layer}.attention.output.LayerNorm'),
    *layer_norm('blocks/mlp_norm', f'{layer}.output.LayerNorm'),
    *_head(model, dense, out),
  )


def _head(model: Bert, dense: str, out: str) -> tuple[Name, ...]:
  """Names of the head, which a checkpoint from pre-training lacks."""
  if model.task == 'embedding':
    return ()
  if model.task == 'span':
    return linear('head/out', 'qa_outputs', bias=True, drawn=True)
  if model.pool == 'mean':
    return linear('head/out', 'classifier', bias=True, drawn=True)
  return (
    *linear('head/dense', dense, bias=True, drawn=True),
    *linear('head/out', out, bias=True, drawn=True),
  )


# Heads of pre-training, of other tasks, and poolers that the model's own does not read.
IGNORED = (
  r'^(cls|lm_head|classifier|qa_outputs)\.',
  r'(^|\.)pooler\.dense\.',
  r'embeddings\.position_ids$',
)

# Checkpoints that were made from TensorFlow's, such as the released BERT.
SPELLINGS = (('LayerNorm.weight', 'LayerNorm.gamma'), ('LayerNorm.bias', 'LayerNorm.beta'))

BERT = Family(
  name='bert',
  architectures=(
    'BertForSequenceClassification',
    'BertForQuestionAnswering',
    'BertModel',
    'BertForMaskedLM',
    'BertForPreTraining',
  ),
  holds=lambda model: isinstance(model, Bert) and model.offset == 0,
  to_model=_bert,
  to_config=lambda model: _to_config(model, 'bert', 'Bert'),
  names=lambda model: _names(model, 'bert', 'bert.pooler.dense', 'classifier'),
  prefix='bert.',
  ignored=IGNORED,
  spellings=SPELLINGS,
)

ROBERTA = Family(
  name='roberta',
  architectures=(
    'RobertaForSequenceClassification',
    'RobertaForQuestionAnswering',
    'RobertaModel',
    'RobertaForMaskedLM',
  ),
  holds=lambda model: isinstance(model, Bert) and model.offset == model.pad_id + 1,
  to_model=_roberta,
  to_config=lambda model: _to_config(model, 'roberta', 'Roberta'),
  names=lambda model: _names(model, 'roberta', 'classifier.dense', 'classifier.out_proj'),
  prefix='roberta.',
  ignored=IGNORED,
  spellings=SPELLINGS,
)
