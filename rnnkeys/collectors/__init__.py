"""Actors: environments that collect with copies of a recurrent policy while the learner learns."""

from .base import ACTOR_KEY as ACTOR_KEY
from .base import POLICY_VERSION_KEY as POLICY_VERSION_KEY
from .base import Actors as Actors
from .exploration import EpsilonGreedy as EpsilonGreedy
from .exploration import epsilon_ladder as epsilon_ladder
from .local import LocalActors as LocalActors
from .processes import ProcessActors as ProcessActors
from .ray_actors import RayActors as RayActors
from .remote import ActorError as ActorError
from .remote import ActorsLostError as ActorsLostError
