"""A small double of apex, as its documentation describes it: https://nvidia.github.io/apex/amp.html."""
