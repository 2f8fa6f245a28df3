"""The state of a run on its devices: born there, described for checkpoints, begun from a run before it."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gspo.learning.critic import Critic
from gspo.model.adapters import LoRA, abstract_adapters, init_adapters
from gspo.model.transformer import Transformer, abstract_params
from gspo.parallel.sharding import Layout, with_shardings
from gspo.types import Params, TrainState

ADAPTER_STREAM = 2  # of the key of a state; 1 is the critic's


class Start(NamedTuple):
    """How a state begins. Both functions are jitted, and their arrays are born on their devices, never whole on one."""

    init: Callable[[jax.Array], TrainState]  # from a random key
    # From given weights, whose buffers it takes; the key is for what is made beside them.
    begin: Callable[[Params, jax.Array], TrainState]
    abstract: TrainState  # the state as ShapeDtypeStructs with shardings, which a checkpoint is restored into
    begins_with: Params | None = None  # what `begin` takes, likewise: a policy's. None: weights as those of the state


def state_on_mesh(
    layout: Layout,
    model: Transformer | Critic,
    optimizer: optax.GradientTransformation,
    *,
    lora: LoRA | None = None,
    with_ref: bool = False,
    entropy_coef: float | None = None,
    num_stale: int = 0,
) -> Start:
    """The state of a policy or a critic: its parameters, and beside them a reference and the parameters of the last
    `num_stale` rollouts, each in buffers of its own: the train step donates the policy's. With lora, all of these are
    adapters, and there is one copy of the weights: adapters that have not moved are the base, and its reference.
    """
    abstract = abstract_params(model, layout)
    weight_shardings = param_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if lora:
        param_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_adapters(lora, abstract))

    def begin(weights: Params, key: jax.Array) -> TrainState:
        params = init_adapters(lora, weights, jax.random.fold_in(key, ADAPTER_STREAM)) if lora else weights
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            ref_params=params if with_ref else None,
            entropy_coef=None if entropy_coef is None else jnp.float32(entropy_coef),
            stale_params=(params,) * num_stale,
            frozen=weights if lora else None,
        )

    shapes = jax.eval_shape(begin, abstract, jax.random.key(0))
    everywhere = layout.sharding()
    shardings = TrainState(
        step=everywhere,
        params=param_shardings,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            param_shardings,
            transform_non_params=lambda _: everywhere,
        ),
        ref_params=param_shardings if with_ref else None,
        entropy_coef=None if entropy_coef is None else everywhere,
        stale_params=(param_shardings,) * num_stale,
        frozen=weight_shardings if lora else None,
    )
    return Start(
        init=jax.jit(lambda key: begin(nn.unbox(model.init_params(key)), key), out_shardings=shardings),
        begin=jax.jit(begin, donate_argnums=0, out_shardings=shardings),
        abstract=with_shardings(shapes, shardings),
    )


def add_critic(
    layout: Layout,
    critic: Critic,
    optimizer: optax.GradientTransformation,
    policy: Start,
    first: Callable[[TrainState], Params] | None = None,
) -> Start:
    """The start of a policy with a critic in its state. first: from the policy's first state the parameters that the
    critic begins with, its own kind or a policy's, to which a last layer of zeros is added. Their buffers are taken, so
    they must not be those of the state. None: random ones.
    """
    own = state_on_mesh(layout, critic, optimizer)

    def add(state: TrainState, key: jax.Array) -> TrainState:
        key = jax.random.fold_in(key, 1)
        if first is None:
            return state.replace(critic=own.init(key))
        return state.replace(critic=own.begin(_with_value(own.abstract.params, first(state)), key))

    return policy._replace(
        init=lambda key: add(policy.init(key), key),
        begin=lambda params, key: add(policy.begin(params, key), key),
        abstract=policy.abstract.replace(critic=own.abstract),
    )


def _with_value(abstract: Params, params: Params) -> Params:
    """A critic's parameters; where it is a policy that they are of, its body and a last layer of zeros."""
    if "value" in params:
        return params
    zeros = abstract["value"]
    body = {name: params[name] for name in abstract["body"]}
    return {"body": body, "value": jnp.zeros(zeros.shape, zeros.dtype, device=zeros.sharding)}


def reward_model_start(
    layout: Layout, model: Critic, optimizer: optax.GradientTransformation, policy: Params | None = None
) -> Start:
    """The start of a reward model: from a key, or from given parameters, its own or those of a policy, to which a last
    layer of zeros is added. policy: its abstract parameters, where it is one."""
    own = state_on_mesh(layout, model, optimizer)
    if policy is None:
        return own
    return own._replace(
        begin=lambda params, key: own.begin(_with_value(own.abstract.params, params), key), begins_with=policy
    )


def shardings_of(layout: Layout, abstract: TrainState) -> TrainState | None:
    """Where each array of the state lies, for `make_train_step`; None on one device."""
    return jax.tree.map(lambda x: x.sharding, abstract) if layout.several else None


def copy_tree(params: Params) -> Params:
    """A tree of its own buffers."""
    return jax.tree.map(jnp.copy, params)
