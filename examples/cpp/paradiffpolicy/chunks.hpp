// Which action is due at a tick: plans (action chunks) arrive late, overlap, or don't come at all.
// C++17, header only, no other library; the arithmetic of the Python package's controller.
//
//   tick        k        k+L            k+8        k+8+L
//   old plan  ..a a a a a a a a          |
//   new plan    - - - - -a a a a a a a a a a a a      made for tick k, arrives with a delay of L ticks
#pragma once

#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace paradiffpolicy {

using Tick = std::int64_t;
using Action = std::vector<double>;

// A plan's actions [T, A], row-major; step To - 1 is for `tick`, that of the window's newest observation.
struct Chunk {
  Tick tick;
  std::vector<double> actions;
};

// Maps the loop's ticks, `stride` of them per step of a plan, to the plan's steps.
struct Grid {
  Tick n_obs_steps, horizon, action_dim, stride;

  // The step of a plan for `plan_tick` that is due at `tick`; -1 if it has none.
  Tick step(Tick plan_tick, Tick tick) const {
    const Tick ahead = tick - plan_tick;
    const Tick steps = ahead >= 0 ? ahead / stride : -((stride - 1 - ahead) / stride);  // rounded down
    const Tick step = steps + n_obs_steps - 1;
    return 0 <= step && step < horizon ? step : -1;
  }

  const double* action(const Chunk& chunk, Tick step) const { return chunk.actions.data() + step * action_dim; }
};

// Blends chunks as they arrive.
class Blending {
 public:
  explicit Blending(Grid grid) : grid(grid) {}
  virtual ~Blending() = default;
  virtual void add(Chunk chunk) = 0;
  // The action for `tick` and the plan's step; nothing if no plan has one.
  virtual std::optional<std::pair<Action, Tick>> act(Tick tick) const = 0;
  virtual void clear() = 0;

  const Grid grid;
};

// The newest plan acts from the moment it arrives.
class Latest : public Blending {
 public:
  using Blending::Blending;
  void add(Chunk chunk) override {
    if (!chunk_ || chunk.tick >= chunk_->tick) chunk_ = std::move(chunk);
  }
  std::optional<std::pair<Action, Tick>> act(Tick tick) const override {
    const Tick step = chunk_ ? grid.step(chunk_->tick, tick) : -1;
    if (step < 0) return {};
    const double* action = grid.action(*chunk_, step);
    return std::pair{Action(action, action + grid.action_dim), step};
  }
  void clear() override { chunk_.reset(); }

 private:
  std::optional<Chunk> chunk_;
};

// Averages all plans' actions for the tick, the i-th oldest with weight exp(-decay i) (ACT, Zhao et al. 2023).
class TemporalEnsemble : public Blending {
 public:
  explicit TemporalEnsemble(Grid grid, double decay = 0.01) : Blending(grid), decay_(decay) {}
  void add(Chunk chunk) override {
    chunks_.push_back(std::move(chunk));
    if (static_cast<Tick>(chunks_.size()) > grid.horizon) chunks_.pop_front();
  }
  std::optional<std::pair<Action, Tick>> act(Tick tick) const override {
    Action sum(grid.action_dim, 0.0);
    double weights = 0.0;
    Tick acting = 0, last = -1;
    for (const Chunk& chunk : chunks_) {
      const Tick step = grid.step(chunk.tick, tick);
      if (step < 0) continue;
      const double weight = std::exp(-decay_ * static_cast<double>(acting++));
      for (Tick i = 0; i < grid.action_dim; ++i) sum[i] += weight * grid.action(chunk, step)[i];
      weights += weight;
      last = step;
    }
    if (last < 0) return {};
    for (double& value : sum) value /= weights;
    return std::pair{sum, last};
  }
  void clear() override { chunks_.clear(); }

 private:
  double decay_;
  std::deque<Chunk> chunks_;
};

// Counts the ticks in which plans were executed: the steps of a plan that come after them are due.
class Progress {
 public:
  // Counts up to `tick`: as executed if a plan was `acting`, since it goes on by the clock.
  void go_on(Tick tick, bool acting) {
    if (acting != spans_.back().acting) spans_.push_back({tick_, executed_at(tick_), acting});
    if (spans_.size() > 1024) spans_.pop_front();
    tick_ = tick;
  }
  // In how many ticks before `tick` plans were executed.
  Tick executed_at(Tick tick) const {
    const Span* found = &spans_.front();
    for (const Span& span : spans_) {
      if (span.start <= tick) found = &span;
    }
    return found->executed + (found->acting && tick > found->start ? tick - found->start : 0);
  }
  // How far a plan for `tick` is put off: by the ticks since then in which no plan was executed.
  Tick waited(Tick tick) const {
    const Tick waited = tick_ - tick - (executed_at(tick_) - executed_at(tick));
    return waited > 0 ? waited : 0;
  }

 private:
  struct Span {
    Tick start, executed;
    bool acting;
  };
  Tick tick_ = 0;
  std::deque<Span> spans_{{0, 0, false}};
};

enum class Fallback {
  hold,  // repeats the last action: holds still where actions are absolute
  stop,  // stops the robot
};

// The chunk logic of a control loop: call `arrived` for plans, then `act`, once per tick.
class ChunkPlayer {
 public:
  // `timeout`: ticks after which a fallback that goes on acting stops the robot.
  ChunkPlayer(std::unique_ptr<Blending> blending, Fallback fallback, double timeout)
      : blending_(std::move(blending)), fallback_(fallback), timeout_(timeout) {}

  // Takes a plan that was made for `chunk.tick` and has arrived at `now`.
  void arrived(Chunk chunk, Tick now) {
    const Grid& grid = blending_->grid;
    if (static_cast<Tick>(chunk.actions.size()) != grid.horizon * grid.action_dim) {
      throw std::invalid_argument("a chunk must have horizon * action_dim numbers");
    }
    progress_.go_on(now, acting_);
    chunk.tick += progress_.waited(chunk.tick);
    blending_->add(std::move(chunk));
  }

  // The action for `now`; nothing: no action is safe, so stop the robot.
  std::optional<Action> act(Tick now) {
    progress_.go_on(now, acting_);
    auto due = blending_->act(now);
    acting_ = due.has_value();
    step_ = due ? due->second : -1;
    if (due) {
      since_.reset();
      return last_ = std::move(due->first);
    }
    if (!since_) since_ = now;
    const bool over = static_cast<double>(now - *since_) > timeout_;
    return fallback_ == Fallback::hold && !over ? last_ : std::nullopt;
  }

  // The plan's step that acted last; -1: the fallback is active.
  Tick step() const { return step_; }

  // How many of a plan's steps have been executed before a tick: the difference between two requests' ticks
  // is what `Policy::plan` takes as `executed`.
  Tick steps_before(Tick tick) const { return progress_.executed_at(tick) / blending_->grid.stride; }

 private:
  std::unique_ptr<Blending> blending_;
  Fallback fallback_;
  double timeout_;
  Progress progress_;
  bool acting_ = false;
  Tick step_ = -1;
  std::optional<Tick> since_;   // the fallback acts
  std::optional<Action> last_;  // the last action of a plan
};

}  // namespace paradiffpolicy
