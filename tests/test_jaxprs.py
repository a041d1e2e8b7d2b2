"""Traced functions as flat lists of equations."""

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.core import jaxprs


def evaluate(flat: jaxprs.Flat, *arguments):
    """Runs the equations one by one."""
    env = dict(zip(flat.inputs, arguments, strict=True))

    def read(value):
        return env.get(value, value.constant)

    for equation in flat.equations:
        out = equation.primitive.bind(*map(read, equation.inputs), **equation.params)
        env |= dict(zip(equation.outputs, out if equation.primitive.multiple_results else [out], strict=True))
    return [read(value) for value in flat.outputs]


@jax.checkpoint
def remembered(x):
    return jnp.sin(x) * jnp.asarray([[1.0, 2.0, 3.0]])


def function(x, y):
    with jax.named_scope("outer"):
        z = jax.nn.relu(jax.jit(lambda a: remembered(a) + y)(x))
        with jax.named_scope("inner"):
            z = jax.jit(lambda a: jax.nn.silu(a) - 1)(z)
    return z, x, jnp.float32(3)


def test_the_equations_compute_what_the_function_computes():
    x, y = jnp.asarray([[0.3, -0.2, 2.0]]), jnp.asarray([[1.0], [2.0]])
    flat = jaxprs.flatten(jax.make_jaxpr(function)(x, y))
    assert not {e.name for e in flat.equations} & set(jaxprs.CALLS)
    for ours, theirs in zip(evaluate(flat, x, y), function(x, y), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_scopes_are_joined_through_calls():
    flat = jaxprs.flatten(jax.make_jaxpr(function)(jnp.ones((1, 3)), jnp.ones((2, 1))))
    scopes = {e.name: e.scope for e in flat.equations}
    assert scopes["sin"] == "outer"
    assert scopes["logistic"] == "outer/inner"


def test_control_flow_stays_with_its_bodies():
    def loop(x):
        return jax.lax.scan(lambda c, a: (c + jnp.cos(a), c), x[0], x)

    flat = jaxprs.flatten(jax.make_jaxpr(loop)(jnp.ones(3)))
    [scan] = [e for e in flat.equations if e.name == "scan"]
    [body] = jaxprs.bodies(scan)
    assert "cos" in {e.name for e in jaxprs.flatten(body).equations}


def test_the_arguments_of_a_scan():
    def function(scale, xs):
        def body(carry, x):
            a, b = carry
            return (a + x["u"], b * scale), x["v"] * a

        return jax.lax.scan(body, (jnp.zeros(2), scale), xs)

    xs = {"u": jnp.zeros((3, 2)), "v": jnp.zeros((3, 2))}
    flat = jaxprs.flatten(jax.make_jaxpr(function)(jnp.asarray(2.0), xs))
    (scan,) = [equation for equation in flat.equations if equation.name == "scan"]
    assert jaxprs.scan_arguments(scan) == (1, 2, 2)
