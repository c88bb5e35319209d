"""The worker's side: pushing gradients, pulling parameters, and the requests that both make."""
