"""What can be said of a model before anything is loaded: is it there, is it one of its engine, are its options any.

In the server's process, so without any engine's library.
"""

from __future__ import annotations

from penstock.core.errors import ModelLoadError
from penstock.engines.child.main import ENGINES
from penstock.engines.host.process import EngineSpec
from penstock.engines.models import find, find_gguf, find_weights
from penstock.engines.options import LlamaOptions, OpenVINOOptions, TransformersOptions, VLLMOptions, parse
from penstock.engines.synthetic import check_options


def check(spec: EngineSpec) -> None:
    """Raise `ModelLoadError` for what loading it would stumble over at once."""
    name, path, options = spec.model, spec.path, spec.options
    match spec.engine:
        case "openvino":
            parse(OpenVINOOptions, options, spec.engine)
            find(name, path)
        case "transformers":
            parse(TransformersOptions, options, spec.engine)
            find_weights(name, path)
        case "vllm":
            parse(VLLMOptions, options, spec.engine)
            find_weights(name, path)
        case "llama":
            parse(LlamaOptions, options, spec.engine)
            find_gguf(name, path)
        case "upstream":
            from penstock.engines.upstream.options import Options, addresses  # brings its HTTP client

            _ = parse(Options, options, spec.engine).secret
            addresses(path)
        case "synthetic":
            check_options(options)
        case unknown:
            raise ModelLoadError(f"There is no engine {unknown!r}. There are {', '.join(ENGINES)}.")
