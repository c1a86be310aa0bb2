"""The methods of search, all asked and told alike: see ``ask_tell``."""

from opmix_dist.search.ask_tell import MixtureSearch, SearchResult
from opmix_dist.search.gradient_search import GradientSearch
from opmix_dist.search.law_search import LawSearch

__all__ = ["GradientSearch", "LawSearch", "MixtureSearch", "SearchResult"]
