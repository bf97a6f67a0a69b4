"""torch's own functions, held from before anything is patched: what falls back on torch must never find itself."""

from torch.nn.utils.clip_grad import _clip_grads_with_norm_ as clip_grads_with_norm_
from torch.nn.utils.clip_grad import _get_total_norm as get_total_norm
from torch.nn.utils.clip_grad import clip_grad_norm_, clip_grad_value_

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
