; The thread pool of q4jit. Its state is 512 bytes that live as long as this code:
;     0 address of pool_run          8 i32 lock: 1 while a job runs     12 i32 stop
;    16 task   24 args   32 n   40 chunk                                of the running job
;    48 i64 shares: what is left is divided by that many, twice the threads
;   128 i32 generation (a futex): counts jobs     132 i32 sleeping workers
;   256 i64 next task
;   384 i32 open: workers may join               388 i32 workers inside the job

target triple = "$triple"

@pool = global { ptr, [504 x i8] } { ptr @pool_run, [504 x i8] zeroinitializer }, align 128

; Take tasks until none is left: a share of what is left, which shrinks, but never less than a
; chunk. A long run of neighbouring tasks reads memory in one stream; a late thread gets little.
define internal void @work(ptr %pool) #0 {
entry:
  %task.at = getelementptr i8, ptr %pool, i64 16
  %task = load ptr, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  %args = load ptr, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  %n = load i64, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  %chunk = load i64, ptr %chunk.at
  %shares.at = getelementptr i8, ptr %pool, i64 48
  %shares = load i64, ptr %shares.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  br label %look
look:
  %now = load atomic i64, ptr %next.at monotonic, align 8
  br label %take
take:
  %from = phi i64 [ %now, %look ], [ %seen, %try ]
  %more = icmp slt i64 %from, %n
  br i1 %more, label %try, label %done
try:
  %left = sub i64 %n, %from
  %share = udiv i64 %left, %shares
  %small = icmp slt i64 %share, %chunk
  %size = select i1 %small, i64 %chunk, i64 %share
  %end = add i64 %from, %size
  %beyond = icmp sgt i64 %end, %n
  %to = select i1 %beyond, i64 %n, i64 %end
  %taken = cmpxchg ptr %next.at, i64 %from, i64 %to monotonic monotonic
  %seen = extractvalue { i64, i1 } %taken, 0
  %mine = extractvalue { i64, i1 } %taken, 1
  br i1 %mine, label %run, label %take
run:
  call void %task(ptr %args, i64 %from, i64 %to)
  br label %look
done:
  ret void
}

; task(args, from, to) over 0 … n by all threads; returns when every task is done.
define void @pool_run(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0 {
entry:
  %lock = getelementptr i8, ptr %pool, i64 8
  %was = cmpxchg ptr %lock, i32 0, i32 1 seq_cst seq_cst
  %free = extractvalue { i32, i1 } %was, 1
  br i1 %free, label %publish, label %alone
alone:
  ; another thread's job is running
  call void %task(ptr %args, i64 0, i64 %n)
  ret void
publish:
  %task.at = getelementptr i8, ptr %pool, i64 16
  store ptr %task, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  store ptr %args, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  store i64 %n, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  store i64 %chunk, ptr %chunk.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  store i64 0, ptr %next.at
  %open = getelementptr i8, ptr %pool, i64 384
  store atomic i32 1, ptr %open seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %sleeping.at = getelementptr i8, ptr %pool, i64 132
  %sleeping = load atomic i32, ptr %sleeping.at seq_cst, align 4
  %none = icmp eq i32 %sleeping, 0
  br i1 %none, label %join, label %wake
wake:
  ; FUTEX_WAKE | FUTEX_PRIVATE_FLAG
  %woken = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 129, i64 2147483647)
  br label %join
join:
  call void @work(ptr %pool)
  ; A worker that comes now finds the job closed; one that is inside is waited for. Both sides
  ; write first and read then, in one total order, so one of them always sees the other.
  store atomic i32 0, ptr %open seq_cst, align 4
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %wait
wait:
  %round = phi i32 [ 0, %join ], [ %round.next, %again ]
  %count = load atomic i32, ptr %inside seq_cst, align 4
  %finished = icmp eq i32 %count, 0
  br i1 %finished, label %unlock, label %linger
linger:
  $pause
  %round.next = add i32 %round, 1
  %long = icmp ugt i32 %round.next, $yield_after
  br i1 %long, label %yield, label %again
yield:
  %yielded = call i32 @sched_yield()
  br label %again
again:
  br label %wait
unlock:
  store atomic i32 0, ptr %lock release, align 4
  ret void
}

; The life of a worker; returns after pool_stop.
define void @pool_worker(ptr %pool) #0 {
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  %generation = getelementptr i8, ptr %pool, i64 128
  %sleeping = getelementptr i8, ptr %pool, i64 132
  %open.at = getelementptr i8, ptr %pool, i64 384
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %leave ]
  br label %poll
poll:
  %round = phi i32 [ 0, %idle ], [ %round.next, %spin ], [ 0, %slept ]
  %now = load atomic i32, ptr %generation seq_cst, align 4
  %changed = icmp ne i32 %now, %seen
  br i1 %changed, label %job, label %unchanged
unchanged:
  %tired = icmp uge i32 %round, $spin_rounds
  br i1 %tired, label %sleep, label %spin
spin:
  $pause
  %round.next = add i32 %round, 1
  br label %poll
sleep:
  %s0 = atomicrmw add ptr %sleeping, i32 1 seq_cst
  ; FUTEX_WAIT | FUTEX_PRIVATE_FLAG: returns at once where the generation has moved on
  %w = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 128, i32 %seen, ptr null)
  br label %slept
slept:
  %s1 = atomicrmw sub ptr %sleeping, i32 1 seq_cst
  br label %poll
job:
  %stop = load atomic i32, ptr %stop.at seq_cst, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %end, label %enter
enter:
  %i0 = atomicrmw add ptr %inside, i32 1 seq_cst
  %open = load atomic i32, ptr %open.at seq_cst, align 4
  %closed = icmp eq i32 %open, 0
  br i1 %closed, label %leave, label %help
help:
  call void @work(ptr %pool)
  br label %leave
leave:
  %i1 = atomicrmw sub ptr %inside, i32 1 seq_cst
  br label %idle
end:
  ret void
}

; Let the workers return.
define void @pool_stop(ptr %pool) #0 {
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  store atomic i32 1, ptr %stop.at seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 129, i64 2147483647)
  ret void
}

declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
$declare_pause

attributes #0 = { nounwind }
