"""Says what happens if torch removes a private name, for ``docs/architecture.md``."""

from __future__ import annotations

_EVERY = "Every capture raises an AttributeError."
_IMPORT = "`import convtap` fails."
_MODE = (
    "The self-test warns once, and convtap uses the function mode, which is slower. Compiled models run eagerly. "
    "Convolutions inside TorchScript or `torch.cond` are not captured."
)

#: The names as the code writes them, and the effect of their absence.
PRIVATE: list[tuple[tuple[str, ...], str]] = [
    # -- the convolution key
    (("TESTING_ONLY_GenericMode",), _MODE),
    (
        (
            "torch._C._dispatch_key_parse",
            "torch._C._dispatch_has_backend_fallback",
            "torch._C._dispatch_call_boxed",
            "OpOverload._handle",
        ),
        _MODE,
    ),
    (("torch._C._dispatch_tls_set_dispatch_key_included",), _IMPORT),
    (("torch._convolution", "torch.ops.aten._convolution"), _IMPORT),
    (
        ("torch._C._dispatch_tls_is_dispatch_key_included",),
        "Captures of compiled models, and of models with `torch.cond`, raise an AttributeError.",
    ),
    (("torch._C._stash_obj_in_tls",), _EVERY),
    (
        ("torch._C._is_key_in_tls", "torch._C._get_obj_in_tls"),
        "Convolutions in the threads of `torch.jit.fork` raise an AttributeError. Nothing else changes.",
    ),
    (
        (
            "torch._ops",
            "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS",
            "torch._ops._higher_order_ops",
        ),
        "Higher-order operators such as `torch.cond` raise torch's own error inside a capture. Without the module, the "
        "first capture raises an ImportError.",
    ),
    # -- function modes, tracing, transforms
    (
        (
            "torch._C._get_function_stack_at",
            "torch._C._len_torch_function_stack",
            "torch._C._pop_torch_function_stack",
            "torch._C._push_on_torch_function_stack",
            "torch._C._len_torch_dispatch_stack",
            "torch._C._functorch.is_functorch_wrapped_tensor",
        ),
        _IMPORT,
    ),
    (
        ("_get_current_function_mode_stack", "_get_current_dispatch_mode_stack"),
        "`timeline`, and what needs one (`top`, `extract(lengths=)`), fails on import.",
    ),
    (("torch._C.DisableTorchFunction", "torch._C._get_tracing_state"), _IMPORT),
    (
        ("torch._C.DisableTorchFunctionSubclass", "Tensor._make_subclass"),
        "Code that fetches a layer's weight inside a capture raises an AttributeError. Without the first name, any torch call "
        "on the weight does; without the second name, `nn.Parameter(weight)` does.",
    ),
    (
        ("torch._C._DisableTorchDispatch",),
        "A capture under a user's `TorchDispatchMode` raises an AttributeError. Nothing else changes.",
    ),
    (("torch._C._set_tracing_state",), "`torch.jit.trace` inside a capture raises an AttributeError."),
    (
        (
            "torch._C._functorch.is_batchedtensor",
            "torch._C._functorch.maybe_get_bdim",
            "torch._C._functorch.get_unwrapped",
        ),
        "A capture inside `vmap`, `grad` or `jvp` raises an AttributeError. Nothing else changes.",
    ),
    (("torch._C._functorch.peek_interpreter_stack",), _EVERY),
    # -- calls of modules
    (
        ("_compiled_call_impl",),
        "The self-test warns once, and layers get hooks instead of shims. If the attribute itself is missing, captures "
        "that read it raise an AttributeError.",
    ),
    (("Module._call_impl",), _EVERY),
    (
        ("Module._wrapped_call_impl",),
        _IMPORT,
    ),
    (
        ("torch.jit._recursive", "torch.jit._recursive.ignored_attributes"),
        "Without the module, `import convtap` fails. Without the list, `torch.jit.script` inspects the shim.",
    ),
    (
        (
            "Module._forward_hooks",
            "Module._forward_pre_hooks",
            "Module._forward_hooks_always_called",
            "Module._forward_hooks_with_kwargs",
            "Module._forward_pre_hooks_with_kwargs",
        ),
        "Captures that use a hook, or look for one, raise an AttributeError or a KeyError.",
    ),
    (("_global_forward_hooks", "_global_forward_pre_hooks"), "Captures of plain layers raise an AttributeError."),
    (
        ("torch.nn.utils._named_member_accessor",),
        "`functional_call` counts as a reader of the weights, so a layer may be reported as bypassed.",
    ),
    # -- Dynamo
    (
        ("torch._C._dynamo", "_FrameAction", "_FrameExecStrategy"),
        "`import convtap` fails.",
    ),
    (
        ("_maybe_set_eval_frame", "_fn"),
        "A model may be compiled once more, or a layer of compiled code may be reported as not seen. On torch 2.13, removing "
        "the first name changes nothing. `_fn` is the name in torch 2.6.",
    ),
    (
        ("torch._dynamo", "torch._dynamo.eval_frame", "torch._dynamo.convert_frame"),
        "convtap looks up the modules by name after the program has imported Dynamo. Under another name, compiled models are "
        "not recognized. Without one of the two inner modules, importing Dynamo inside a capture fails.",
    ),
    (("eval_frame._stance",), "Captures of compiled models, and `compare` of one, raise an AttributeError."),
    (
        ("eval_frame._set_stance",),
        "An interrupt while the stance is set raises an AttributeError, and the stance stays set. Nothing else changes.",
    ),
    (("_torchdynamo_orig_callable",), "A model whose `forward` was compiled counts as not compiled."),
    (
        ("torch._inductor",),
        "Captures of compiled models with parameters on CUDA raise an AttributeError. Nothing else changes.",
    ),
    (
        ("torch._higher_order_ops",),
        "The branches of `torch.cond` count as separate compiled code, and their tracing counts as a forward pass.",
    ),
    # -- TorchScript
    (
        ("ScriptModule._c", "ScriptModule._c._type"),
        "Functions that run a scripted model and restore it (`list_layers`, `timeline`) raise an AttributeError. Captures do "
        "not need it.",
    ),
    # -- outside of _torch
    (
        ("Module._parameters", "Module._buffers", "Module._modules"),
        "Every capture raises an AttributeError or a KeyError. torch's own `state_dict` format depends on these names.",
    ),
    (("torch._lazy_clone",), "A probe at import notices its absence, and every snapshot is a full clone."),
    (
        ("torch._C._data_address",),
        "Captures with hooks, `max_bytes=`, `detach=False`, and `list_layers` with an example fail with an AttributeError.",
    ),
    (("torch._C._is_cow_tensor",), "Captures with hooks and `detach=False` fail with an AttributeError."),
    (
        ("UntypedStorage._cdata",),
        "Captures with hooks, `detach=False`, and `list_layers` with an example fail with an AttributeError.",
    ),
    (("torch._C._current_graph_task_id",), _IMPORT),
    (
        ("Tensor._version",),
        "`copy=False`, `detach=False`, `finite`, and `list_layers` with an example fail with a ConvtapError or an "
        "AttributeError that names it.",
    ),
    (
        ("Tensor._base",),
        "Captures in which code outside of the model calls its parts in turn may raise an AttributeError.",
    ),
    (("Tensor._is_view",), "`grads=True` raises an AttributeError."),
    (("Tensor._backward_hooks",), "`finite(backward=True)` raises an AttributeError."),
    (
        ("Tensor._indices", "Tensor._values"),
        "Captures of a sparse COO output raise an AttributeError when they count its bytes.",
    ),
    (("DTensor._local_tensor",), "`finite` checks a whole DTensor instead of its local part."),
    (("_conv_forward",), "Captures of a `Conv1d` raise an AttributeError."),
    (
        ("_dynamo_marked_constant",),
        "A compiled `tapped` model raises Dynamo's own error instead of convtap's.",
    ),
    (
        ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "torch.distributed.algorithms._checkpoint"),
        "Names of layers keep the prefix of the wrapper, and `compare` rejects compiled models.",
    ),
    (
        (
            "_ConvNd",
            "_NormBase",
            "_MaxPoolNd",
            "_AvgPoolNd",
            "_AdaptiveMaxPoolNd",
            "_AdaptiveAvgPoolNd",
            "_ConstantPadNd",
            "_ReflectionPadNd",
            "_ReplicationPadNd",
            "_CircularPadNd",
        ),
        _IMPORT,
    ),
    (
        ("torch._C._dispatch_has_kernel_for_dispatch_key",),
        "`timeline` raises an AttributeError at an operator without its own rule.",
    ),
    (("OpOverload._schema",), "`timeline` raises an AttributeError."),
    (("torch.utils._python_dispatch",), "`timeline`, `top` and `extract(lengths=)` raise an ImportError."),
]

#: Private names that are not torch's: names of Python and Keras, and convtap's own variables.
NOT_TORCH = {
    *("_getframe", "_fields", "_replace", "_exit", "_is_gil_enabled"),
    *("_inbound_nodes", "_keras_history", "_layers", "_torch_params"),
    *("_args", "_kwargs", "_inner"),
    *("_repr_png_", "_tally"),
    "_fused_rms_norm",  # an operator that torch 2.6 lacks
}

#: The folder whose tables name torch operators as text. A removed operator never runs, so its name does no harm.
OPERATOR_TABLES = "_time"
