//! Metrics whose labels come from closed sets, so that every series exists from the start.
//!
//! Upstairs:   `metrics` declares; callers index a family with a value of its label type.
//! Downstairs: `prometheus`.
//!
//! Invariants kept here
//!   M1  A family has one child for each value of its label type, made when it is declared.

use std::marker::PhantomData;
use std::ops::Deref;

use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter,
    IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// A label with a closed set of values.
pub trait Label: Copy + 'static {
    /// Name of the label.
    const NAME: &'static str;
    /// Every value, in the order of [`Label::index`].
    fn all() -> Vec<Self>;
    /// Number of values.
    fn count() -> usize {
        Self::all().len()
    }
    /// Place of this value in [`Label::all`].
    fn index(self) -> usize;
    /// Text of this value.
    fn text(self) -> &'static str;
}

/// No label, one label or a pair of labels.
pub trait Labels: Copy + 'static {
    /// Names, in order.
    fn names() -> Vec<&'static str>;
    /// Every combination, in the order of [`Labels::index`].
    fn all() -> Vec<Self>;
    /// Place of this combination in [`Labels::all`].
    fn index(self) -> usize;
    /// Texts, in the order of [`Labels::names`].
    fn texts(self) -> Vec<&'static str>;
    /// Texts that each label can have, in the order of [`Labels::names`].
    fn texts_of_each() -> Vec<Vec<&'static str>>;
}

impl Labels for () {
    fn names() -> Vec<&'static str> {
        Vec::new()
    }
    fn all() -> Vec<Self> {
        vec![()]
    }
    fn index(self) -> usize {
        0
    }
    fn texts(self) -> Vec<&'static str> {
        Vec::new()
    }
    fn texts_of_each() -> Vec<Vec<&'static str>> {
        Vec::new()
    }
}

fn texts_of<L: Label>() -> Vec<&'static str> {
    L::all().into_iter().map(Label::text).collect()
}

impl<L: Label> Labels for L {
    fn names() -> Vec<&'static str> {
        vec![L::NAME]
    }
    fn all() -> Vec<Self> {
        <L as Label>::all()
    }
    fn index(self) -> usize {
        Label::index(self)
    }
    fn texts(self) -> Vec<&'static str> {
        vec![self.text()]
    }
    fn texts_of_each() -> Vec<Vec<&'static str>> {
        vec![texts_of::<L>()]
    }
}

impl<A: Label, B: Label> Labels for (A, B) {
    fn names() -> Vec<&'static str> {
        vec![A::NAME, B::NAME]
    }
    fn all() -> Vec<Self> {
        let with = |a| B::all().into_iter().map(move |b| (a, b));
        A::all().into_iter().flat_map(with).collect()
    }
    fn index(self) -> usize {
        self.0.index() * B::count() + self.1.index()
    }
    fn texts(self) -> Vec<&'static str> {
        vec![self.0.text(), self.1.text()]
    }
    fn texts_of_each() -> Vec<Vec<&'static str>> {
        vec![texts_of::<A>(), texts_of::<B>()]
    }
}

/// Upper bounds of every histogram. Unit: seconds; 25 us is a lease, 10 s a very long restore.
const BUCKETS: [f64; 18] = [
    0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// A kind of metric that a family can be made of.
pub trait Child: Sized {
    /// Name of the kind in the documents.
    const KIND: &'static str;
    /// Makes and registers the family; one child for each list of label values.
    fn children(
        registry: &Registry,
        name: &str,
        help: &str,
        labels: &[&str],
        values: &[Vec<&str>],
    ) -> prometheus::Result<Vec<Self>>;
}

macro_rules! child {
    ($child:ty, $family:ty, $options:ident, $kind:literal, $tune:expr) => {
        impl Child for $child {
            const KIND: &'static str = $kind;
            fn children(
                registry: &Registry,
                name: &str,
                help: &str,
                labels: &[&str],
                values: &[Vec<&str>],
            ) -> prometheus::Result<Vec<Self>> {
                let tune: fn($options) -> $options = $tune;
                let family = <$family>::new(tune($options::new(name, help)), labels)?;
                registry.register(Box::new(family.clone()) as Box<dyn Collector>)?;
                let child = |values: &Vec<&str>| family.get_metric_with_label_values(values);
                values.iter().map(child).collect()
            }
        }
    };
}
child!(IntCounter, IntCounterVec, Opts, "counter", |opts| opts);
child!(Counter, CounterVec, Opts, "counter", |opts| opts);
child!(IntGauge, IntGaugeVec, Opts, "gauge", |opts| opts);
child!(Gauge, GaugeVec, Opts, "gauge", |opts| opts);
child!(
    Histogram,
    HistogramVec,
    HistogramOpts,
    "histogram",
    |opts| { opts.buckets(BUCKETS.to_vec()) }
);

/// One metric with all its series (M1).
#[derive(Debug)]
pub struct Family<L, C> {
    children: Vec<C>,
    labels: PhantomData<fn(L)>,
}

impl<L: Labels, C: Child> Family<L, C> {
    /// Makes the series of a metric.
    ///
    /// # Panics
    /// When the name is not valid or taken: every start and every test would show it.
    pub(super) fn declare(registry: &Registry, name: &str, help: &str) -> Self {
        let values: Vec<_> = L::all().into_iter().map(L::texts).collect();
        let children = C::children(registry, name, help, &L::names(), &values);
        Self {
            children: children.expect("metric names are valid and declared once"),
            labels: PhantomData,
        }
    }

    /// The series with these labels.
    #[expect(
        clippy::indexing_slicing,
        reason = "one child for each value of the label type (M1)"
    )]
    pub fn of(&self, labels: L) -> &C {
        &self.children[labels.index()]
    }
}

impl<C: Child> Deref for Family<(), C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.of(())
    }
}

/// What the documents say of one metric.
#[derive(Debug, Clone)]
pub struct Declaration {
    /// Name, with its unit at the end.
    pub name: &'static str,
    /// counter, gauge or histogram.
    pub kind: &'static str,
    /// What it counts.
    pub help: String,
    /// Each label with the values that it can have.
    pub labels: Vec<(&'static str, Vec<&'static str>)>,
}

impl Declaration {
    pub(super) fn new<L: Labels, C: Child>(name: &'static str, help: String) -> Self {
        let labels = L::names().into_iter().zip(L::texts_of_each()).collect();
        Self {
            name,
            kind: C::KIND,
            help,
            labels,
        }
    }
}
