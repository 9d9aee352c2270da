"""The keys that a cluster keeps in etcd; docs/etcd.md lists every one with an example."""

from __future__ import annotations

from sheepfs.core.names import check_cluster_name


class Keys:
    """Names of a cluster's keys, all below `/sheepfs/<cluster>/`."""

    def __init__(self, cluster: str) -> None:
        check_cluster_name(cluster)
        self.root = f"/sheepfs/{cluster}/"
        self.config = self.root + "config"
        self.map = self.root + "map"
        self.leader = self.root + "leader"
        self.nodes = self.root + "nodes/"
        self.alive = self.root + "alive/"
        self.pools = self.root + "pools/"
        self.vdis = self.root + "vdis/"
        self.vdi_names = self.root + "vdi-names/"
        self.locks = self.root + "locks/"
        self.layers = self.root + "layers/"
        self.trash = self.root + "trash/"
        self.snapshots = self.root + "snapshots/"
        self.retired = self.root + "retired/"
        self.requests = self.root + "requests/"
        self.building = self.root + "building/"
        self.reclaim = self.root + "reclaim/"
        self.counters = self.root + "counters/"
        self.settings = self.root + "settings/"
        self.fencing = self.root + "fencing"
        self.importing = self.root + "importing"
        self.wishes = self.root + "wishes/"
        self.accepted_loss = self.root + "accepted-loss"

    def node(self, node: int) -> str:
        """Key of a node's permanent facts."""
        return f"{self.nodes}{node}"

    def alive_node(self, node: int) -> str:
        """Leased key of a running node."""
        return f"{self.alive}{node}"

    def pool(self, copies: int) -> str:
        """Key that asks the leader for a pool of `copies`."""
        return f"{self.pools}{copies}"

    def vdi(self, name: str) -> str:
        """Key of a VDI's record."""
        return self.vdis + name

    def vdi_name(self, vdi: int) -> str:
        """Key of a VDI's current name, to find its record by id."""
        return f"{self.vdi_names}{vdi}"

    def lock(self, vdi: int) -> str:
        """Leased key of the mount that holds a VDI."""
        return f"{self.locks}{vdi}"

    def layer(self, layer: int) -> str:
        """Key of a layer's birth."""
        return f"{self.layers}{layer}"

    def trashed(self, item: int) -> str:
        """Key of a deleted VDI or snapshot that can still be restored."""
        return f"{self.trash}{item}"

    def snapshots_of(self, vdi: int) -> str:
        """Prefix of a VDI's snapshots."""
        return f"{self.snapshots}{vdi}/"

    def snapshot(self, vdi: int, tag: str) -> str:
        """Key of a snapshot's record."""
        return f"{self.snapshots}{vdi}/{tag}"

    def retired_name(self, name: str) -> str:
        """Key that keeps the name of a deleted VDI for its snapshots."""
        return self.retired + name

    def request(self, vdi: int, number: str) -> str:
        """Leased key of one request to a VDI's holder."""
        return f"{self.requests}{vdi}/{number}"

    def building_layer(self, layer: int) -> str:
        """Leased key of a layer whose map is being made: reclaim leaves it alone."""
        return f"{self.building}{layer}"

    def reclaim_family(self, family: int) -> str:
        """Key that asks for a look at what a family does not use any more."""
        return f"{self.reclaim}{family}"

    def setting(self, what: str) -> str:
        """Key of what operators have set for all daemons, for example `recovery`."""
        return self.settings + what

    def wish(self, node: int) -> str:
        """Key of what operators want of a node."""
        return f"{self.wishes}{node}"

    def counter(self, what: str) -> str:
        """Key of the last id given out: `node`, `vdi` or `layer`."""
        return self.counters + what
