"""The state of a run on its devices: born there, described for checkpoints, begun from a run before it."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gspo.learning.critic import Critic
from gspo.model.transformer import Transformer
from gspo.parallel.sharding import Layout, tree_shardings, with_shardings
from gspo.types import Params, TrainState


def state_on_mesh(
    layout: Layout,
    model: Transformer | Critic,
    optimizer: optax.GradientTransformation,
    *,
    with_ref: bool = False,
    entropy_coef: float | None = None,
    num_stale: int = 0,
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """Returns (init, abstract): a jitted `init(key) -> TrainState` whose arrays are born on their devices, never whole
    on one; and the same state as ShapeDtypeStructs with shardings, which a checkpoint is restored into.
    """
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    param_shardings = tree_shardings(layout, boxed)

    def init(key) -> TrainState:
        params = nn.unbox(model.init_params(key))
        coef = None if entropy_coef is None else jnp.float32(entropy_coef)
        ref_params, stale_params = params if with_ref else None, (params,) * num_stale
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, coef, stale_params=stale_params)

    shapes = jax.eval_shape(init, jax.random.key(0))
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
    )
    return jax.jit(init, out_shardings=shardings), with_shardings(shapes, shardings)


def add_critic(
    layout: Layout,
    critic: Critic,
    optimizer: optax.GradientTransformation,
    init: Callable[[jax.Array], TrainState],
    abstract: TrainState,
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """The (init, abstract) of `state_on_mesh`, with the state of a critic in it."""
    critic_init, critic_abstract = state_on_mesh(layout, critic, optimizer)
    return lambda key: init(key).replace(critic=critic_init(jax.random.fold_in(key, 1))), abstract.replace(
        critic=critic_abstract
    )


def shardings_of(layout: Layout, abstract: TrainState) -> TrainState | None:
    """Where each array of the state lies, for `make_train_step`; None on one device."""
    return jax.tree.map(lambda x: x.sharding, abstract) if layout.several else None


def started_from(params: Params, state: TrainState) -> TrainState:
    """A fresh state with the parameters of a run before it, for the policy, the reference and the body of the critic."""
    ref_params = None if state.ref_params is None else copy_tree(params)
    critic = state.critic
    if critic is not None:
        body = {name: copy_tree(params[name]) for name in critic.params["body"]}
        critic = critic.replace(params=critic.params | {"body": body})
    stale_params = tuple(copy_tree(params) for _ in state.stale_params)
    return state.replace(params=params, ref_params=ref_params, critic=critic, stale_params=stale_params)


def copy_tree(params: Params) -> Params:
    """A tree of its own buffers: the train step donates the policy's."""
    return jax.tree.map(jnp.copy, params)
