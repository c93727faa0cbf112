"""Which target next: weights, requests in flight, cool-downs, breakers."""

from collections.abc import Sequence

from gateway.protocol.routing import Route, Target


class Balancer:
    """The health of this process's targets. Opened and closed by app.py."""

    def choose(self, route: Route, tried: Sequence[Target] = ()) -> Target:
        """The target to ask next."""
        return route[0][0]
