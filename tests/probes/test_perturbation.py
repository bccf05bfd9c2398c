"""Tests of bn_research.probes.perturbation: derivatives by intermediates of traced functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.probes.perturbation import trace_layers

KEYS = jax.random.split(jax.random.key(0), 5)
X = jax.random.normal(KEYS[0], (6, 4))
PARAMS = [jax.random.normal(key, (4, 4)) for key in KEYS[1:4]]
Z = jax.random.normal(KEYS[4], (6, 4))


def network(params, x, deltas, wrap=lambda f: f):
    """Three layers by hand, with a perturbation of each; the reference of all that follows."""

    def block(w, delta, h):
        pre_activation = jax.nn.relu(h) @ w + delta
        return pre_activation, jnp.tanh(pre_activation)

    layers, h = {}, x
    for number, (w, delta) in enumerate(zip(params, deltas, strict=True)):
        layers[f"layer{number}"], h = wrap(block)(w, delta, h)
    return h, layers


ZEROS = [jnp.zeros((6, 4))] * 3


def plain(wrap=lambda f: f):
    return lambda params, x: network(params, x, ZEROS, wrap)


def loss(output):
    return jnp.sum(output * Z)


def gradients(program):
    zeros = {i: jnp.zeros((6, 4)) for i, reaches in enumerate(program.reaches_output) if reaches}
    return jax.grad(lambda deltas: loss(program.run(program.args, deltas)[0]))(zeros)


def expected_gradients():
    return jax.grad(lambda deltas: loss(network(PARAMS, X, deltas)[0]))(ZEROS)


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda *args: jax.jit(f)(*args)),
    "checkpoint": jax.checkpoint,
    "jit in checkpoint": lambda f: jax.checkpoint(jax.jit(f)),
    "checkpoint in jit": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_gradients_equal_those_of_a_perturbation_written_by_hand(wrap):
    program = trace_layers(plain(wrap), PARAMS, X)
    assert program.names == ("layer0", "layer1", "layer2")
    assert program.reaches_output == (True, True, True)
    found = gradients(program)
    for number, expected in enumerate(expected_gradients()):
        np.testing.assert_allclose(found[number], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_steps_are_the_layers_as_functions_of_the_one_before(wrap):
    program = trace_layers(plain(wrap), PARAMS, X)
    _, layers, env = program.run(program.args, {})
    assert program.paths[0] is None
    other = jax.random.normal(jax.random.key(7), (6, 4))
    for number in (1, 2):
        found = program.step(number, env, other)
        expected = jax.nn.relu(jnp.tanh(other)) @ PARAMS[number]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_output_and_layers_are_the_functions_own():
    program = trace_layers(plain(jax.jit), PARAMS, X)
    output, layers, _ = program.run(program.args, {})
    expected, expected_layers = network(PARAMS, X, ZEROS)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    for found, name in zip(layers, expected_layers, strict=True):
        np.testing.assert_allclose(found, expected_layers[name], rtol=1e-5, atol=1e-6)


def test_layers_come_in_the_order_of_computation_even_out_of_a_jitted_function():
    @jax.jit
    def forward(params, x):  # jit sorts the keys of what it returns: "10" comes before "9"
        first = x @ params[0]
        second = jax.nn.relu(first) @ params[1]
        return second, {"layer9": first, "layer10": second}

    assert trace_layers(forward, PARAMS, X).names == ("layer9", "layer10")


@jax.custom_jvp
def clipped(h):
    return jnp.clip(h, -0.1, 0.1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), 3.0 * tangents[0]))


@jax.custom_vjp
def backward_only(h):
    return jnp.round(h)


backward_only.defvjp(lambda h: (jnp.round(h), None), lambda _, g: (5.0 * g,))


@pytest.mark.parametrize(("rule", "factor"), [(clipped, 3.0), (backward_only, 5.0)])
def test_derivative_rules_are_kept(rule, factor):
    def forward(params, x):
        first = x @ params[0]
        return jax.jit(rule)(first), {"first": first}

    np.testing.assert_allclose(gradients(trace_layers(forward, PARAMS, X))[0], factor * Z)


def test_a_layer_that_only_passes_through_a_jitted_function():
    def forward(params, x):
        first = x @ params[0]
        same, _ = jax.jit(lambda h: (h, h + 1))(first)
        return jnp.sin(first), {"first": same}

    program = trace_layers(forward, PARAMS, X)
    np.testing.assert_allclose(gradients(program)[0], jnp.cos(X @ PARAMS[0]) * Z, rtol=1e-5)


def test_what_cannot_be_perturbed_has_no_gradient():
    def forward(params, x):
        unused = x @ params[0]

        def body(h, w):
            h = jnp.tanh(h @ w)
            return h, h

        last, inside = jax.lax.scan(body, x, jnp.stack(params))
        return last, {"unused": unused, "in a loop": inside[1], "constant": jnp.ones((6, 4))}

    program = trace_layers(forward, PARAMS, X)
    reaches = dict(zip(program.names, program.reaches_output, strict=True))
    assert reaches == {"unused": False, "in a loop": False, "constant": False}
    assert program.paths == (None, None, None)


def test_what_a_derivative_rule_uses_inside_cannot_be_perturbed():
    """δ outside would miss the way through the inside, and give a gradient that is too small."""

    @jax.jit
    def inside(h):
        h = h + 1
        return h, jnp.sin(h)

    @jax.custom_jvp
    def both(h):
        return inside(h)

    @both.defjvp
    def rule(primals, tangents):
        return both(*primals), (tangents[0], tangents[0])

    def forward(params, x):
        inner, outer = both(x @ params[0])
        return outer + inner, {"inner": inner}

    assert trace_layers(forward, PARAMS, X).reaches_output == (False,)


def test_a_loop_that_gives_out_a_layer_twice_hides_one_of_them():
    def forward(params, x):
        def body(h, w):
            h = jnp.tanh(h @ w)
            return h, h

        last, every = jax.lax.scan(body, x, jnp.stack(params))
        return last + every[-1], {"last": last}

    assert trace_layers(forward, PARAMS, X).reaches_output == (False,)


def test_the_result_of_a_loop_can_be_perturbed():
    def forward(params, x):
        last, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack(params))
        return jnp.sin(last), {"last": last}

    program = trace_layers(forward, PARAMS, X)
    _, (last,), _ = program.run(program.args, {})
    np.testing.assert_allclose(gradients(program)[0], jnp.cos(last) * Z, rtol=1e-5)


def test_parallel_branches_have_no_path():
    def forward(params, x):
        left, right = x @ params[0], x @ params[1]
        both = (left + right) @ params[2]
        return both, {"left": left, "right": right, "both": both}

    program = trace_layers(forward, PARAMS, X)
    assert [path is not None for path in program.paths] == [False, False, True]
    _, layers, env = program.run(program.args, {})
    matrix = jax.jacfwd(functools.partial(program.step, 2, env))(layers[1])
    np.testing.assert_allclose(matrix[0, :, 0, :], PARAMS[2].T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda params, x: x, "forward returns a"),
        (lambda params, x: (x, [x]), "forward returns intermediates in a list"),
        (lambda params, x: (x, {}), "no layer to probe"),
        (lambda params, x: (x, {"a": x.astype(int)}), "intermediates['a'] is of int32"),
        (lambda params, x: (x, {"a": x.T}), "allowed is (batch, ..., features) with batch=6"),
        (lambda params, x: (x, {"a": x[:, 0]}), "intermediates['a'] has shape (6,)"),
        (lambda params, x: (x, {"a": x[:, :0]}), "intermediates['a'] has shape (6, 0)"),
    ],
)
def test_bad_functions(forward, message):
    with pytest.raises(ValueError) as error:
        trace_layers(forward, PARAMS, X)
    assert message in str(error.value) and "\n" not in str(error.value)
