//! Operations that the kernel holds, by slot and generation.
//!
//! Upstairs:   `disk::ring`.
//! Downstairs: nothing; bookkeeping only.
//!
//! Invariants kept here
//!   D1  An operation stays in its slot, buffer and all, until `take` is called with the number
//!       that `insert` gave out; a number from an earlier use of the slot takes nothing.
//!
//! Not here on purpose: no unsafe code and no ring. What a completion means is decided upstairs.

use super::super::Op;

/// Slots for a fixed number of operations.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    held: Option<Held>,
}

/// An operation and what is known of its submission.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) op: Op,
    /// How often the kernel asked to try again.
    pub(super) retries: u32,
    /// Address and length of each run, as the kernel reads them while the operation is in flight:
    /// the layout of `iovec`, in memory that moving the slot does not move.
    pub(super) runs: Vec<[usize; 2]>,
}

impl Held {
    fn new(op: Op) -> Self {
        Self {
            op,
            retries: 0,
            runs: Vec::new(),
        }
    }
}

impl Slots {
    pub(super) fn new(depth: usize) -> Self {
        let count = u32::try_from(depth).unwrap_or(u32::MAX);
        let slots = (0..count)
            .map(|_| Slot {
                generation: 0,
                held: None,
            })
            .collect();
        Self {
            slots,
            free: (0..count).rev().collect(),
        }
    }

    /// Operations held.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Keeps `op` and returns the number that its completion will carry, or gives it back when
    /// every slot is taken.
    pub(super) fn insert(&mut self, op: Op) -> Result<u64, Op> {
        let Some(index) = self.free.pop() else {
            return Err(op);
        };
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Err(op);
        };
        slot.generation = slot.generation.wrapping_add(1);
        slot.held = Some(Held::new(op));
        Ok(number(slot.generation, index))
    }

    /// The operation of that number, still held.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Held> {
        self.slot(number)?.held.as_mut()
    }

    /// Takes the operation of that number out: the kernel is done with it.
    pub(super) fn take(&mut self, number: u64) -> Option<Held> {
        let held = self.slot(number)?.held.take()?;
        self.free.push(index(number));
        Some(held)
    }

    /// Takes everything out, for a ring that will never answer.
    pub(super) fn take_all(&mut self) -> Vec<Held> {
        let mut all = Vec::new();
        for (index, slot) in (0..).zip(&mut self.slots) {
            if let Some(held) = slot.held.take() {
                self.free.push(index);
                all.push(held);
            }
        }
        all
    }

    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(index(number) as usize)?;
        (self::number(slot.generation, index(number)) == number).then_some(slot)
    }
}

fn number(generation: u32, index: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

fn index(number: u64) -> u32 {
    u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::super::{FileId, OpKind};
    use super::*;

    fn op(user: u64) -> Op {
        Op {
            user,
            kind: OpKind::Sync,
            file: FileId(1),
            at: 0,
            buf: None,
            buf_at: 0,
            len: 0,
            more: Vec::new(),
        }
    }

    #[test]
    fn slots_answer_only_to_the_number_of_the_current_use() {
        let mut slots = Slots::new(1);
        let first = slots.insert(op(1)).unwrap();
        assert_eq!(slots.take(first).unwrap().op.user, 1);
        let second = slots.insert(op(2)).unwrap();
        assert!(
            slots.take(first).is_none(),
            "a completion of an earlier use freed the slot"
        );
        assert!(slots.take(second + 1).is_none(), "no such slot");
        assert_eq!(slots.take(second).unwrap().op.user, 2);
        assert!(slots.take(second).is_none(), "taken twice");
    }

    #[test]
    fn slots_give_the_operation_back_when_full() {
        let mut slots = Slots::new(2);
        slots.insert(op(1)).unwrap();
        slots.insert(op(2)).unwrap();
        assert_eq!(slots.insert(op(3)).unwrap_err().user, 3);
        assert_eq!(
            (slots.len(), slots.take_all().len(), slots.len()),
            (2, 2, 0)
        );
    }
}
