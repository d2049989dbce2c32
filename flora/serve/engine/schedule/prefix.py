"""The prefix cache: full KV pages of past and running sequences, shared by whoever starts with the same tokens.

A page is found by what it depends on: the serving digest of the adapter (None: the base) and every token up to the
page's end, compared as they are, not by a hash. So no request ever meets keys of other weights or of another prompt.
On a CPU an answer from the cache has the bits of one that is computed whole. On a GPU it has them where a row's keys do
not depend on the rows beside it; else they are those of whatever step computed them, which may differ in the last bits.
Source: block-granular sharing as in vLLM (arXiv:2309.06180, section 4.4), as a tree per adapter as in SGLang
(arXiv:2312.07104, section 3).
"""

from collections import OrderedDict
from collections.abc import Sequence as Many

from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.pages import NULL_PAGE, PagePool, Use


class PrefixPage:
    """A full page of keys and values, and the pages that continue it. The cache owns the page; sequences hold it."""

    __slots__ = ("children", "digest", "due", "holders", "is_listed", "is_proven", "page", "parent", "tokens")

    def __init__(
        self, parent: "PrefixPage | None", tokens: tuple[int, ...], page: int, digest: str | None, *, is_listed: bool
    ) -> None:
        self.parent = parent  # None: the root of a digest, which has no page
        self.tokens = tokens  # whose keys and values lie in the page
        self.page = page
        self.digest = digest
        self.children: dict[tuple[int, ...], PrefixPage] = {}  # by their tokens
        self.holders = 0  # running sequences
        self.is_listed = is_listed  # whether a later request may find it
        self.is_proven = False  # whether anybody but its maker ever held it
        self.due = 0  # its place in the order of leaving, once nobody holds it


_Order = OrderedDict[PrefixPage, None]  # who is to leave first, first


class PrefixCache:
    """Trees of pages, one for each serving digest. Whoever holds a page holds all pages before it too."""

    def __init__(self, pages: PagePool, eviction: Eviction, page_tokens: int) -> None:
        self._pages = pages
        self._eviction = eviction
        self._page_tokens = page_tokens
        self._roots: dict[str | None, PrefixPage] = {}
        # What nobody holds; the proven ones apart. A sequence lets go of its last page first, and whoever proves a page
        # proves those before it, so a page leaves before the one that it continues.
        self._idle: tuple[_Order, _Order] = (OrderedDict(), OrderedDict())
        self.num_evictions = 0
        eviction.join(self)

    @property
    def idle_pages(self) -> int:
        return len(self._idle[False]) + len(self._idle[True])

    @property
    def first_due(self) -> int | None:
        """See Idle.first_due."""
        first = self._first
        return first.due if first else None

    def evict_first(self) -> None:
        """See Idle.evict_first."""
        first = self._first
        assert first is not None
        assert not first.children, "what continues a page leaves before it"
        self._unlist(first)
        self.num_evictions += 1

    @property
    def _first(self) -> PrefixPage | None:
        first = None
        for order in self._idle:
            for head in order:
                first = head if first is None or head.due < first.due else first
                break
        return first

    def find(self, digest: str | None, tokens: list[int]) -> list[PrefixPage]:
        """The longest run of pages that begins `tokens`, in order; at least one token stays to be computed."""
        at, found, size = self._roots.get(digest), [], self._page_tokens
        for end in range(size, len(tokens), size):
            if at is None or not at.children:
                break
            at = at.children.get(tuple(tokens[end - size : end]))
            if at is not None:
                found.append(at)
        return found

    def hold(self, path: Many[PrefixPage]) -> None:
        """A sequence starts to need these pages, which somebody else has made."""
        for page in path:
            if not page.holders:
                del self._idle[page.is_proven][page]
            page.holders += 1
            page.is_proven = True

    def publish(self, digest: str | None, path: list[PrefixPage], tokens: tuple[int, ...], page: int) -> None:
        """The full KV page that follows `path` becomes the cache's, held by its sequence; or its elder twin is held.

        path  what the sequence holds so far; grows by one. If there is such a page already, that one is held, so that
              later pages have their place behind it, and the sequence goes on reading its own.
        """
        parent = path[-1] if path else self._root(digest)
        child = parent.children.get(tokens)
        if child is None:
            child = PrefixPage(parent, tokens, page, digest, is_listed=parent.is_listed)
            child.holders = 1
            if parent.is_listed:
                parent.children[tokens] = child
        else:
            self.hold((child,))
        path.append(child)

    def give_up_twins(self, path: Many[PrefixPage], pages: Many[int]) -> None:
        """Frees the twins that this sequence alone holds: its own page of the same content takes the twin's place.

        path, pages  what the sequence holds, and what it reads
        """
        for shared, own in zip(path, pages, strict=False):
            if shared.page != own and shared.holders == 1:
                self._drop(shared)
                shared.page = own

    def release(self, path: Many[PrefixPage]) -> None:
        """A sequence needs these pages no longer. They stay until their room is wanted, unless they were forgotten."""
        for page in reversed(path):
            page.holders -= 1
            assert page.holders >= 0
            if page.holders:
                continue
            if page.is_listed:
                page.due = self._eviction.due(is_proven=page.is_proven)
                self._idle[page.is_proven][page] = None
            else:
                self._drop(page)

    def forget(self, digest: str | None) -> None:
        """No later request finds a page of this digest; those that are held go when they are let go."""
        root = self._roots.get(digest)
        for page in list(root.children.values()) if root else ():
            self._unlist(page)

    def distrust(self, path: Many[PrefixPage]) -> None:
        """The same for everything that shares its beginning with `path`: a sequence that holds it has failed."""
        if path:
            self._unlist(path[0])

    def _root(self, digest: str | None) -> PrefixPage:
        root = self._roots.get(digest)
        if root is None:
            root = self._roots[digest] = PrefixPage(None, (), NULL_PAGE, digest, is_listed=True)
        return root

    def _unlist(self, page: PrefixPage) -> None:
        """The page and all that continue it are no longer found, and go at once where nobody holds them."""
        if not page.is_listed:
            return
        parent = page.parent
        assert parent is not None
        del parent.children[page.tokens]
        if parent.parent is None and not parent.children:
            del self._roots[page.digest]
        behind = [page]
        while behind:
            page = behind.pop()
            page.is_listed = False
            behind += page.children.values()
            page.children = {}
            if not page.holders:
                del self._idle[page.is_proven][page]
                self._drop(page)

    def _drop(self, page: PrefixPage) -> None:
        assert self._pages.use(page.page) is Use.KV
        self._pages.free((page.page,))
