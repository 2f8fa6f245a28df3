"""What a critic begins with: the policy's first weights, those of a policy that another run has trained, or a reward
model, which is a critic that is read at the last token only. The last two may be of another size than the policy.
"""

import dataclasses
from collections.abc import Callable

from gspo.data.tokenizer import Tokenizer
from gspo.learning.critic import POLICY_WEIGHTS, Critic, CriticPlan
from gspo.learning.state import copy_tree
from gspo.model.spec import ModelSpec
from gspo.model.transformer import Transformer, abstract_params
from gspo.run.identity import HOW_IT_RUNS, REWARD_MODEL, identity, kind_of, restore_known, saved_identity
from gspo.types import Params, TrainState, UserError


def critic_spec(plan: CriticPlan, policy: ModelSpec) -> ModelSpec:
    """The model under the critic, which runs as the policy does."""
    if not plan.model:
        return policy
    return dataclasses.replace(ModelSpec(**plan.model), **{name: getattr(policy, name) for name in HOW_IT_RUNS})


def first_params(plan: CriticPlan, critic: Critic, tokenizer: Tokenizer) -> Callable[[TrainState], Params] | None:
    """What `add_critic` takes as `first`. Its function raises UserError where the folder cannot be read, or is of a
    model that reads other tokens than the policy writes."""
    if not plan.init_from:
        return None
    if plan.init_from == POLICY_WEIGHTS:
        body = abstract_params(critic, critic.layout)["body"]
        return lambda state: copy_tree({name: state.weights[name] for name in body})
    return lambda state: _read(plan.init_from, critic, tokenizer)


def _read(folder: str, critic: Critic, tokenizer: Tokenizer) -> Params:
    try:
        kind = kind_of(saved_identity(folder))
        model = critic if kind == REWARD_MODEL else Transformer(critic.spec, layout=critic.layout)
        own = identity(critic.spec, tokenizer, kind=kind)
        return restore_known(folder, model, critic.layout, own)[1]
    except UserError as error:
        raise UserError(f"critic.init_from={folder}: {error}") from None
