"""What several test modules share.

- `matrix`: the devices, backends, dtypes, modes and gates that the tests run over
- `tensors`: tensors in any memory layout, and comparing them to the last bit
- `block_cases`, `cqc_cases`: problems of the block and of the loss, and evaluating them with any backend
- `rule`: the rule by which an error is judged
- `extended`: the equations in long double, the truth for float64
- `processes`: tests in a process of their own
- `builds`: commands without the caller's build settings, and the files that a build writes
- `ahead`: Triton's kernels compiled without a GPU, and the resources that they use
- `errors`: expecting an error by its message
"""
