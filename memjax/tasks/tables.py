"""Tasks by name: prompts, words for labels, scores, and where TensorFlow Datasets has them.

SST-2, RTE, CB, BoolQ, WiC, WSC, MultiRC, COPA, ReCoRD, SQuAD and DROP have the prompts and words of
MeZO (Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
<https://arxiv.org/abs/2305.17333>`_, appendix E, as its code spells them). SST-5 has the words of
LM-BFF (Gao et al., 2021, `Making Pre-trained Language Models Better Few-shot Learners
<https://arxiv.org/abs/2012.15723>`_). The other prompts are ours, in the same manner: published
ones put the word before the text, which a decoder cannot read.
"""

from memjax.naming import nearest
from memjax.tasks import prepare
from memjax.tasks.task import Task

_ENTAILMENT = ('entailment', 'not_entailment')
_PAIR = (('sentence1', 'premise'), ('sentence2', 'hypothesis'))
_NLI = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_RTE = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'

GLUE = (
  Task(
    'cola',
    'classification',
    '{sentence}\nIs this sentence acceptable English? Yes or No?\n',
    words=('No', 'Yes'),
    texts=('sentence',),
    names=('unacceptable', 'acceptable'),
    columns=('origin', 'label', 'mark', 'sentence'),
    metrics=('matthews', 'accuracy'),
    tfds='glue/cola',
  ),
  Task(
    'sst2',
    'classification',
    '{sentence} It was',
    words=('terrible', 'great'),
    texts=('sentence',),
    names=('negative', 'positive'),
    rename=(('text', 'sentence'),),
    prepare=prepare.stripped('sentence'),
    tfds='glue/sst2',
  ),
  Task(
    'mrpc',
    'classification',
    '{sentence1}\n{sentence2}\nDo these two sentences mean the same? Yes or No?\n',
    words=('No', 'Yes'),
    texts=('sentence1', 'sentence2'),
    names=('not_equivalent', 'equivalent'),
    rename=(('#1 String', 'sentence1'), ('#2 String', 'sentence2'), ('Quality', 'label')),
    metrics=('f1', 'accuracy'),
    tfds='glue/mrpc',
  ),
  Task(
    'qqp',
    'classification',
    '{question1}\n{question2}\nDo these two questions ask the same? Yes or No?\n',
    words=('No', 'Yes'),
    texts=('question1', 'question2'),
    names=('not_duplicate', 'duplicate'),
    rename=(('is_duplicate', 'label'),),
    metrics=('f1', 'accuracy'),
    tfds='glue/qqp',
  ),
  Task(
    'stsb',
    'regression',
    '{sentence1}\n{sentence2}\nHow similar are these two sentences, from 0 to 5?\n',
    words=('0', '1', '2', '3', '4', '5'),
    texts=('sentence1', 'sentence2'),
    rename=(('score', 'label'),),
    metrics=('pearson', 'spearman'),
    tfds='glue/stsb',
  ),
  Task(
    'mnli',
    'classification',
    _NLI,
    words=('Yes', 'Maybe', 'No'),
    texts=('premise', 'hypothesis'),
    names=('entailment', 'neutral', 'contradiction'),
    rename=(*_PAIR, ('gold_label', 'label')),
    tfds='glue/mnli',
    splits=('train', 'validation_matched'),
  ),
  Task(
    'qnli',
    'classification',
    '{sentence}\n{question}\nDoes the sentence answer the question? Yes or No?\n',
    words=('Yes', 'No'),
    texts=('question', 'sentence'),
    names=_ENTAILMENT,
    tfds='glue/qnli',
  ),
  Task(
    'rte',
    'classification',
    _RTE,
    words=('Yes', 'No'),
    texts=('premise', 'hypothesis'),
    names=_ENTAILMENT,
    rename=_PAIR,
    tfds='super_glue/rte',
  ),
  Task(
    'wnli',
    'classification',
    _RTE,
    words=('No', 'Yes'),
    texts=('premise', 'hypothesis'),
    names=('not_entailment', 'entailment'),
    rename=_PAIR,
    tfds='glue/wnli',
  ),
)

SUPERGLUE = (
  Task(
    'cb',
    'classification',
    _NLI,
    words=('Yes', 'No', 'Maybe'),
    texts=('premise', 'hypothesis'),
    names=('entailment', 'contradiction', 'neutral'),
    metrics=('accuracy', 'macro_f1'),
    tfds='super_glue/cb',
  ),
  Task(
    'boolq',
    'classification',
    '{passage} {question}\n',
    words=('No', 'Yes'),
    texts=('question', 'passage'),
    names=('False', 'True'),
    prepare=prepare.boolq,
    tfds='super_glue/boolq',
  ),
  Task(
    'wic',
    'classification',
    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    '{sentence1}\n{sentence2}\n',
    words=('No', 'Yes'),
    texts=('sentence1', 'sentence2'),
    names=('False', 'True'),
    tfds='super_glue/wic',
  ),
  Task(
    'wsc',
    'classification',
    '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {span1_text}? '
    'Yes or No?\n',
    words=('No', 'Yes'),
    texts=('text', 'span1_text'),
    names=('False', 'True'),
    prepare=prepare.wsc,
    tfds='super_glue/wsc.fixed',
  ),
  Task(
    'multirc',
    'classification',
    '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
    'Yes or No?\n',
    words=('No', 'Yes'),
    texts=('paragraph', 'question', 'answer'),
    names=('False', 'True'),
    prepare=prepare.multirc,
    metrics=('accuracy', 'f1', 'group_accuracy'),
    tfds='super_glue/multirc',
  ),
  Task(
    'copa',
    'choice',
    '{prompt}',
    names=('choice1', 'choice2'),
    prepare=prepare.copa,
    tfds='super_glue/copa',
  ),
  Task(
    'record',
    'choice',
    '{passage}\n-',
    prepare=prepare.record,
    metrics=('accuracy', 'token_f1', 'exact_match'),
    tfds='super_glue/record',
  ),
)

OTHERS = (
  Task(
    'sst5',
    'classification',
    '{sentence} It was',
    words=('terrible', 'bad', 'okay', 'good', 'great'),
    texts=('sentence',),
    rename=(('text', 'sentence'),),
    columns=('label', 'sentence'),
    prepare=prepare.stripped('sentence'),
  ),
  Task(
    'trec',
    'classification',
    '{text}\nWhat does this question ask for? Description, Entity, Abbreviation, Person, Location, '
    'or Number?\n',
    words=('Description', 'Entity', 'Abbreviation', 'Person', 'Location', 'Number'),
    texts=('text',),
    names=('DESC', 'ENTY', 'ABBR', 'HUM', 'LOC', 'NUM'),
    rename=(('question', 'text'),),
    columns=('label', 'text'),
    prepare=prepare.trec,
    tfds='trec',
    splits=('train', 'test'),
  ),
  Task(
    'snli',
    'classification',
    _NLI,
    words=('Yes', 'Maybe', 'No'),
    texts=('premise', 'hypothesis'),
    names=('entailment', 'neutral', 'contradiction'),
    rename=(('gold_label', 'label'), *_PAIR),
    prepare=prepare.labelled,
    tfds='snli',
    splits=('train', 'test'),
  ),
  Task(
    'squad',
    'generation',
    'Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:',
    answer=' {answer}\n',
    texts=('question', 'context'),
    label='answers',
    prepare=prepare.squad,
    metrics=('token_f1', 'exact_match'),
    tfds='squad/v1.1',
  ),
  Task(
    'drop',
    'generation',
    'Passage: {context}\nQuestion: {question}\nAnswer:',
    answer=' {answer}\n',
    label='answers',
    prepare=prepare.drop,
    metrics=('token_f1', 'drop_f1', 'drop_exact_match'),
    tfds='drop',
    splits=('train', 'dev'),
  ),
  Task(
    'instruct',
    'generation',
    'Below is an instruction that describes a task. Write a response that appropriately completes '
    'the request.\n\n### Instruction:\n{instruction}\n\n### Response:',
    answer='{answer}',
    label='output',
    metrics=('exact_match', 'token_f1'),
    stop='',
    new_tokens=256,
  ),
)

TASKS = {task.name: task for task in (*GLUE, *SUPERGLUE, *OTHERS)}


def find(name: str) -> Task:
  """Returns the task called `name`.

  Raises:
    ValueError: for an unknown one, with the nearest that exists.

  >>> find('sst2').words
  ('terrible', 'great')
  """
  if name not in TASKS:
    raise ValueError(f"no task is called {name!r}; {nearest(name, TASKS)}, and 'jsonl:FILE'")
  return TASKS[name]
