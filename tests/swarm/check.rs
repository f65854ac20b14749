//! What must not be, looked for while it runs.

use std::collections::{BTreeMap, BTreeSet};

use nydus_backend::swarm::grid::group_of;
use nydus_backend::swarm::port::Blame;
use nydus_backend::swarm::{Object, Peer};

use crate::liar::Lie;
use crate::node::number;
use crate::world::World;

impl World<'_> {
    pub(crate) fn blamed(&mut self, by: usize, peer: Peer, blame: Blame, object: Object, piece: u32) {
        let culprit = number(&peer);
        let guilty = matches!(self.nodes[culprit].lie, Some(Lie::WrongBytes | Lie::FalseVouch));
        // Whom those accuse who lie about what they read themselves proves nothing.
        if !guilty && self.nodes[by].lie != Some(Lie::FalseVouch) {
            let what =
                format!("node {by} put honest node {culprit} in quarantine for {blame:?}, {object:?} piece {piece}");
            self.outcome.wrong(what);
        }
    }

    /// Whether a node waits on a request for a piece that the one asked has not got either.
    fn waits(&self, id: u64, object: u32, piece: u32) -> Option<usize> {
        let call = self.calls.get(&id)?;
        let open = !call.left && !call.closed && call.promised.has(piece) && self.reaches(call.from, call.to);
        let asked = &self.nodes[call.to];
        let has = asked.disk.contains_key(&(object, piece)) || asked.coming.contains_key(&(object, piece));
        (open && !has && asked.lie.is_none()).then_some(call.to)
    }

    /// After a promise: whether the one who got it waits for itself now. Nobody else's promise can have closed a circle.
    pub(crate) fn check_waits(&mut self, object: u32, piece: u32, start: usize) {
        let mut edges = BTreeMap::new();
        let mut next = vec![start];
        while let Some(node) = next.pop() {
            if edges.contains_key(&node) {
                continue;
            }
            let mut calls = self.promises.remove(&(object, piece, node)).unwrap_or_default();
            calls.retain(|id| self.calls.get(id).is_some_and(|call| !call.left && !call.closed));
            let to: Vec<usize> = calls.iter().filter_map(|id| self.waits(*id, object, piece)).collect();
            if !calls.is_empty() {
                self.promises.insert((object, piece, node), calls);
            }
            next.extend(to.iter().copied());
            edges.insert(node, to);
        }
        if let Some(node) = circle(&edges) {
            let (now, group) = (self.now, group_of(piece));
            let what = format!("{now} us: a circle of waits for piece {piece} (group {group}) through node {node}");
            self.outcome.wrong(format!("{what}: {edges:?}"));
        }
    }
}

/// Returns a node on a circle of these edges, if there is one.
fn circle(edges: &BTreeMap<usize, Vec<usize>>) -> Option<usize> {
    let mut done = BTreeSet::new();
    for start in edges.keys() {
        let mut path = vec![(*start, 0)];
        let mut on_path = BTreeSet::from([*start]);
        while let Some((node, next)) = path.last_mut() {
            let to = edges.get(node).and_then(|to| to.get(*next)).copied();
            *next += 1;
            match to {
                Some(to) if on_path.contains(&to) => return Some(to),
                Some(to) if done.contains(&to) => {}
                Some(to) => {
                    on_path.insert(to);
                    path.push((to, 0));
                }
                None => {
                    let (node, _) = path.pop().expect("it was the last");
                    on_path.remove(&node);
                    done.insert(node);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    pub(crate) fn a_circle_is_found_and_a_tree_is_none() {
        let edges = |pairs: &[(usize, usize)]| {
            let mut edges = BTreeMap::<usize, Vec<usize>>::new();
            pairs.iter().for_each(|(from, to)| edges.entry(*from).or_default().push(*to));
            edges
        };
        assert_eq!(circle(&edges(&[(1, 2), (2, 3), (1, 3), (4, 1)])), None);
        assert!(circle(&edges(&[(1, 2), (2, 3), (3, 4), (4, 2)])).is_some());
    }
}
