"""The generic tier: any model that transformers can build, through transformers' own modules.

What a model needs is planned from its headers (`plan`), then it is loaded (`loaded`), whole or with a part that accelerate reads
anew for each pass. `Generic` (`carousel`) serves requests with it. The room refuses to know text, settings and families.
"""

from __future__ import annotations

from .carousel import Generic as Generic
from .carousel import Limits as Limits
from .loaded import Loaded as Loaded
from .loaded import load as load
from .plan import GenericPlan as GenericPlan
from .plan import make_plan as make_plan
